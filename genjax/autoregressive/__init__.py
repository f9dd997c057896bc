"""Autoregressive models: log p(x) = sum_t log p(x_t | x_<t), of tokens and of pixels."""

from genjax.autoregressive.decoding import *
from genjax.autoregressive.language import *
from genjax.autoregressive.pixels import *
