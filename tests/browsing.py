"""A page in a headless browser, and what it asked for and complained of."""

import json


def opened(browser, path, width, scheme="light"):
    browser.get("about:blank")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.absolute().as_uri())
    return browser


def complaints(browser):
    """What the browser wrote into its console since a page was opened."""
    return browser.get_log("browser")


def requests(browser):
    """The addresses that the page asked for since it was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def widths(browser):
    """How wide the page is, and how much of it is seen."""
    return browser.execute_script("const page = document.documentElement; return [page.scrollWidth, page.clientWidth]")
