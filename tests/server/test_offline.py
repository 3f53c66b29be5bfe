"""The offline LLM API passes the same gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, projectors, store, good, bad = sys.argv[1:]
    policy = {"method": "safe-lora", "select": "all"}
    section = {"projectors": projectors, "store": store, "policy": policy}
    llm = LLM(model, enable_lora=True, max_lora_rank=16, enforce_eager=True, max_model_len=512,
              additional_config={"safelora": section},
              worker_extension_cls="safelora_vllm.integration.required.Guard")
    sampling = SamplingParams(temperature=0, max_tokens=6)
    texts = [llm.generate("The capital of France is", sampling, lora_request=request)[0].outputs[0].text
             for request in (None, LoRARequest("good", 1, good))]
    try:
        llm.llm_engine.add_lora(LoRARequest("bad", 2, bad))
        refusal = None
    except Exception as error:
        refusal = str(error)
    print("RESULT" + json.dumps({"texts": texts, "refusal": refusal}))
"""


def test_offline_llm(aligned: Path, projectors: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{}")
    (bad / "adapter_model.safetensors").write_bytes(b"nonsense")
    script = tmp_path / "offline.py"
    script.write_text(SCRIPT)
    paths = [aligned, projectors, tmp_path / "store", adapters["qv"], bad]
    run = subprocess.run(
        [sys.executable, str(script), *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": "safelora", "VLLM_CPU_KVCACHE_SPACE": "1"},
        timeout=400,
    )
    lines = [line for line in run.stdout.splitlines() if "RESULT" in line]
    assert lines, run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads(lines[0].partition("RESULT")[2])
    assert all(result["texts"])
    assert "weights_malformed" in result["refusal"]
    (published,) = (tmp_path / "store" / "published").iterdir()
    report = json.loads((published / "report.json").read_text())["report"]
    assert {module["decision"] for module in report["modules"]} == {"projected"}
