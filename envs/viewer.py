"""A small picture of one engine's last decisions: queue, batch, c and n."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from engine.core.action import ActionGrid
from engine.core.telemetry import NUM_DECODES, NUM_WAITING, Observation

FPS = 25
"""Decisions in a second of video: about the pace of a loaded engine."""

DECISIONS, BAR, LABEL, STRIP = 120, 2, 80, 48
WIDTH, HEIGHT = LABEL + BAR * DECISIONS, 4 * STRIP
"""Size in pixels; both are multiples of 16, which video encoders ask for."""

BACKGROUND, RULE, INK = (255, 255, 255), (210, 210, 210), (60, 60, 60)
STRIPS = (
    ("queue", (213, 94, 0)),
    ("batch", (0, 114, 178)),
    ("c", (0, 158, 115)),
    ("n", (204, 121, 167)),
)
"""Name and colour of each strip, from top to bottom."""

GLYPHS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71111",
    "8": "75757", "9": "75717", "/": "11244", "a": "25755", "b": "65656", "c": "74447", "e": "74647", "h": "55755",
    "n": "65555", "q": "75571", "t": "72222", "u": "55557",
}  # fmt: skip
"""Five rows of three pixels, each an octal digit."""


class Viewer:
    """Draws the last `DECISIONS` decisions of one engine as bars, the newest at the right.

    The queue (requests whose prompt is not done) and the batch (requests that decode) are drawn against their largest
    value in the picture, rounded up to a power of two; c and n by their place among the choices of `grid`. Labels
    beside each strip show its newest value and the value at its top.
    """

    def __init__(self, grid: ActionGrid) -> None:
        self._choices = (grid.candidate_choices, grid.budget_choices)
        self._seen: deque[tuple[int, int, int, int]] = deque(maxlen=DECISIONS)

    def clear(self) -> None:
        """Clear the decisions at the beginning of an episode."""
        self._seen.clear()

    def add(self, action: NDArray[np.int64], observation: Observation, e: int) -> None:
        """Append a decision: indices of c and n, and the telemetry after it, of which row `e` is this engine's."""
        load = observation.load[e]
        self._seen.append((int(load[NUM_WAITING]), int(load[NUM_DECODES]), int(action[0]), int(action[1])))

    def frame(self) -> NDArray[np.uint8]:
        """(HEIGHT, WIDTH, 3) the picture."""
        picture = np.full((HEIGHT, WIDTH, 3), BACKGROUND, dtype=np.uint8)
        seen = np.array(self._seen, dtype=np.int64).reshape(-1, len(STRIPS))
        for place, (name, colour) in enumerate(STRIPS):
            strip = picture[place * STRIP : (place + 1) * STRIP]
            values = seen[:, place]
            if place < 2:
                top = 1 << int(max(values.max(initial=1) - 1, 0)).bit_length()
                shares, shown = values / top, values
            else:
                choices = np.array(self._choices[place - 2])
                top, shares, shown = int(choices[-1]), (values + 1) / choices.size, choices[values]
            _draw_bars(strip, shares, colour)
            _write(strip, name, 6)
            _write(strip, f"{shown[-1]}/{top}" if shown.size else f"/{top}", 24)
        return picture


def _draw_bars(strip: NDArray[np.uint8], shares: NDArray[np.float64], colour: tuple[int, int, int]) -> None:
    """Bars whose heights are `shares` of the strip, which ends in a rule."""
    height = STRIP - 6
    bars = np.repeat(np.rint(shares * height).astype(np.int64), BAR)
    if bars.size:
        rows = np.arange(height, 0, -1)[:, None]
        strip[4 : 4 + height, WIDTH - bars.size :][rows <= bars] = colour
    strip[-2:, LABEL:] = RULE


def _write(strip: NDArray[np.uint8], text: str, top: int) -> None:
    """Text in letters twice the size of `GLYPHS`, from `top` pixels below the upper edge."""
    left = 4
    for letter in text:
        rows = [[int(row) >> shift & 1 for shift in (2, 1, 0)] for row in GLYPHS[letter]]
        mask = np.kron(np.array(rows), np.ones((2, 2), dtype=np.int64)).astype(bool)
        strip[top : top + 10, left : left + 6][mask] = INK
        left += 8
