"""Plugins: the `manager` finds and asks them, `lookup` finds what they serve by name, `inventory` lists them."""

from slimcli.plugins.inventory import Plugin as Plugin
from slimcli.plugins.inventory import commands as commands
from slimcli.plugins.inventory import installed as installed
from slimcli.plugins.lookup import RegisteredMethod as RegisteredMethod
from slimcli.plugins.lookup import build_model as build_model
from slimcli.plugins.lookup import check_models as check_models
from slimcli.plugins.lookup import find_backbone as find_backbone
from slimcli.plugins.lookup import find_method as find_method
from slimcli.plugins.lookup import methods as methods
from slimcli.plugins.lookup import open_plugin_dataset as open_plugin_dataset
from slimcli.plugins.manager import Failure as Failure
from slimcli.plugins.manager import plugin_manager as plugin_manager
