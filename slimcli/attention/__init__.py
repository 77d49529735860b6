"""Attention with a bias on every key: the `kernels`, the `choice` among them, and `modes` that reach into a model."""

from slimcli.attention.choice import KERNELS as KERNELS
from slimcli.attention.choice import Running as Running
from slimcli.attention.choice import choose as choose
from slimcli.attention.choice import running as running
from slimcli.attention.kernels import NEVER as NEVER
from slimcli.attention.kernels import attend as attend
from slimcli.attention.modes import AttentionRecorder as AttentionRecorder
from slimcli.attention.modes import ReplacedAttention as ReplacedAttention
from slimcli.attention.modes import TrainingAttention as TrainingAttention
from slimcli.attention.modes import biased_attention as biased_attention
