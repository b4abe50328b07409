"""An axolotl plugin for tests: CUDA graphs without CUDA, whose replays run what was recorded again (test_graphs.rerun).

Process 1 records anew at every pass, as one does whose packs outgrow their room; process 0 records once. Each writes
how often it recorded and replayed to graphs-<rank>.json in the output folder.
"""

import json
import os
from pathlib import Path

from axolotl.integrations.base import BasePlugin
from test_graphs import rerun

from fastdora import graphs
from fastdora.plugin import plugin


class Rerun(BasePlugin):
    def register(self, cfg: dict) -> None:
        graphs.record, plugin._why_no_graphs = rerun, lambda cfg: None
        if os.environ.get("RANK") == "1":
            graphs.Graphs._has_room = lambda *_: False

    def post_train(self, cfg, model) -> None:
        forward = model.get_base_model().get_decoder().forward
        counts = {"recorded": forward.recorded, "replays": forward.replays}
        (Path(cfg.output_dir) / f"graphs-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(counts))
