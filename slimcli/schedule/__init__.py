"""Which patches leave when (`schedule`), how many each block then uses (`counts`), and what that costs (`cost`)."""

from slimcli.schedule.cost import Architecture as Architecture
from slimcli.schedule.cost import Planning as Planning
from slimcli.schedule.counts import counts_with_total as counts_with_total
from slimcli.schedule.counts import falling_counts as falling_counts
from slimcli.schedule.counts import highest_keep_rate as highest_keep_rate
from slimcli.schedule.counts import life_moments as life_moments
from slimcli.schedule.counts import patches_per_layer as patches_per_layer
from slimcli.schedule.schedule import Drops as Drops
from slimcli.schedule.schedule import Schedule as Schedule
from slimcli.schedule.schedule import check_keep_rate as check_keep_rate
from slimcli.schedule.schedule import check_whole as check_whole
from slimcli.schedule.schedule import default_drop_layers as default_drop_layers
from slimcli.schedule.schedule import default_life_layer as default_life_layer
from slimcli.schedule.schedule import with_keep_rate as with_keep_rate
