"""The page in headless Chromium: it draws without errors, and its text can be read."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from evomoe_plugin.metrics import parse_log
from evomoe_plugin.report import page
from evomoe_plugin.report.routed_sample import LayerRouting, RoutedSample
from evomoe_plugin.report.token_kinds import KINDS

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
EXPERTS = 16
SMALLEST = 11.5  # pixels

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install chromium")

# What is wider than the page (but for what scrolls by itself), and the smallest text on it.
_MEASURE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(details => { details.open = true });
  const page = document.documentElement, wide = [], sizes = [];
  for (const node of document.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    if (!node.closest(".wide, svg") && box.right > innerWidth + 1) wide.push(node.outerHTML);
    if (![...node.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || node.closest("title"))
      continue;
    const svg = node.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    sizes.push(parseFloat(getComputedStyle(node).fontSize) * scale);
  }
  console.log("measured " + JSON.stringify({
    width: innerWidth, scrolls: page.scrollWidth > innerWidth, wide: wide.slice(0, 3),
    smallest: Math.min(...sizes), charts: document.querySelectorAll("svg").length,
  }));
});
</script>"""


def log(name):
    lines = []
    for update in range(5, 101, 5):
        values = {"loss": 9 - update / 20, "ppl": 2 ** (9 - update / 20), "wpb": 1024, "wps": 900}
        values |= {"encoder_experts_per_token": 2, "decoder_experts_per_token": 1, "mfu": 0.3}
        values |= {"mflops_per_token": 3, "forward_ms": 500, "backward_ms": 900, "data_wait_ms": 1}
        lines.append(json.dumps({k: str(v) for k, v in values.items()} | {"num_updates": update}))
        load = [[(e + update) % 5 / 40 for e in range(EXPERTS)]] * 3
        record = {"encoder_load": load, "decoder_load": load, "decoder_entropy": [0.1, 2, 1]}
        lines.append(json.dumps({"experts_num_updates": update, **record}))
    return parse_log(lines, name)


def sample():
    even_EE = torch.full((EXPERTS, EXPERTS), 0.5).tolist()
    layers = [
        LayerRouting(
            number=n,
            layer=2 * n + 1,
            tokens=100,
            experts=EXPERTS,
            load_E=[0.9] + [0.1 / EXPERTS] * (EXPERTS - 2) + [math.nan],
            weight_E=[1.0] * EXPERTS,
            experts_per_token=2.0,
            entropy=0.1,
            null_per_token=None,
            purity=0.5,
            kinds_KE=[[1 / EXPERTS] * EXPERTS] * len(KINDS),
            sources_SE=[[1 / EXPERTS] * EXPERTS] * 2,
            together_EE=even_EE,
            similarity_EE=even_EE,
            commonest=[[("▁unexceptionable", 0.3), ("<&>", 0.1)] * 3] * EXPERTS,
        )
        for n in range(2)
    ]
    kinds = [(name, 0.2) for name in KINDS]
    sources = [("texts/a-folder-of-a-long-name", 0.5), ("texts/b", 0.5)]
    return RoutedSample(
        "run/checkpoints/checkpoint_best", 100, 100, "valid", kinds, sources, True, layers
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_and_can_be_read(tmp_path, width):
    html = page.render([log("a-run-of-a-rather-long-name"), log("b")], [sample()], "Runs & routing")
    file = tmp_path / "page.html"
    # An iframe of this width: a window cannot be as narrow as a phone.
    file.write_text(html.replace("</body>", _MEASURE + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="page.html" style="width:{width}px;height:900px;border:0">')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--window-size=1400,{1000}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = re.findall(r'CONSOLE.*?\] "(.*)", source:', done.stderr)
    (measured,) = [line.removeprefix("measured ") for line in console]  # and no errors
    found = json.loads(measured)
    assert found["width"] == width and found["charts"] > 20
    assert not found["scrolls"] and found["wide"] == []
    assert found["smallest"] >= SMALLEST
