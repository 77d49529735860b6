"""What a backbone must do: the `checks`, the `subject` they are made on, and the `kit` that runs them."""

from slimcli.conformance.checks import CHECKS as CHECKS
from slimcli.conformance.checks import WAITING as WAITING
from slimcli.conformance.kit import Check as Check
from slimcli.conformance.kit import check_backbone as check_backbone
from slimcli.conformance.kit import conformance_tests as conformance_tests
from slimcli.conformance.kit import run_check as run_check
from slimcli.conformance.subject import awake as awake
