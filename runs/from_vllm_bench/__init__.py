"""From the results of `vllm bench serve` on somebody's own GPU to a simulated engine like theirs."""
