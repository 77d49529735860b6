"""Tables I to V and figure 4 of the paper: its figures (`published`), `models`, `cells`, `workflow` and `layout`."""
