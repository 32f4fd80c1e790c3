"""The programs of the guide to pictures run as they stand, on a tiny model."""

import pytest
from families import model_of, processor_of
from test_guides import BLOCK, ROOT, perform


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_programs_of_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_of("llava").save_pretrained("tiny")
    processor_of("llava").save_pretrained("tiny")
    known = {}
    blocks = BLOCK.findall((ROOT / "docs" / "vision.md").read_text())
    assert [kind for kind, _ in blocks] == ["python"] * len(blocks)
    for kind, block in blocks:
        perform(kind, block, known)
        if "trainer.train()" in block:
            assert known["trainer"].state.global_step == known["settings"].max_steps
    assert "\n16\n" in f"\n{capsys.readouterr().out}"  # tokens of a picture of 16 x 16 in patches of 4
