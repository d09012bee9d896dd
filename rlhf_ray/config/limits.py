"""Bounds on numbers that would be too much for the arithmetic behind them."""

from __future__ import annotations

# Everything behind a reward is float32, which ends at 3.4e38: the spread of a group, of a batch and of its tokens, and
# a critic's squared error are sums of squares there. Two totals (of functions, and of a reward model beside them) of at
# most 2e14 differ by 4e14; its square, summed over 2^30 tokens, is 1.7e38. Larger rewards would give an infinite
# spread, and with it advantages of exactly 0: a run that learns nothing and says nothing.
LARGEST_REWARD = 1e14
