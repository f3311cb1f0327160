"""Clients that mean no good, against a vLLM server under a governor: who was lost, who was answered twice.

    python -m tests.engine.backends.vllm.drill http://127.0.0.1:8000 --model tiny --streams 200 --leaving 40

Prints one JSON object. A stream is whole when it ends with one finish reason, one usage and one `[DONE]`, and has the
tokens that were asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import Counter
from typing import Any

import httpx

TOKENS = 24


async def stream(client: httpx.AsyncClient, model: str, number: int, leaves: bool) -> tuple[str, str]:
    """(what became of it, its text)."""
    body = {
        "model": model,
        "prompt": f"def function_{number % 7}(argument):\n    return ",
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, ends, usages, done = "", 0, [], 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}", ""
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done += 1
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return f"error: {chunk['error'].get('message', chunk['error'])}", text
                for choice in chunk["choices"]:
                    text += choice["text"]
                    ends += choice["finish_reason"] is not None
                if chunk.get("usage"):
                    usages.append(chunk["usage"]["completion_tokens"])
                if leaves and text:
                    return "left", text
    except httpx.HTTPError as error:
        return f"cut off: {type(error).__name__}" if text else f"refused: {type(error).__name__}", text
    return ("whole" if (ends, usages, done) == (1, [TOKENS], 1) else f"torn: {ends} {usages} {done}"), text


async def drill(arguments: argparse.Namespace) -> dict[str, Any]:
    """All streams at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=arguments.url, timeout=600.0, limits=limits) as client:
        coming = (stream(client, arguments.model, i, i < arguments.leaving) for i in range(arguments.streams))
        answers = await asyncio.gather(*coming)
        texts: dict[int, set[str]] = {}
        for i, (fate, text) in enumerate(answers):
            if fate == "whole":
                texts.setdefault(i % 7, set()).add(text)
        report: dict[str, Any] = {
            "fates": Counter(fate for fate, _ in answers),
            "texts_differ": sum(len(found) > 1 for found in texts.values()),
        }
        try:
            for _ in range(100):
                metrics = (await client.get("/metrics")).text
                found = re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (\S+)$", metrics, re.MULTILINE)
                if not any(map(float, found)):
                    break
                await asyncio.sleep(0.1)
            report["left_in_vllm"] = sum(map(float, found))
            ends = re.findall(r'^vllm:request_success_total{.*finished_reason="(\w+)".*} (\S+)$', metrics, re.MULTILINE)
            report["vllm_counts"] = {reason: int(float(count)) for reason, count in ends if float(count)}
        except httpx.HTTPError:
            report["server"] = "gone"
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--leaving", type=int, default=0)
    print(json.dumps(asyncio.run(drill(parser.parse_args()))))
