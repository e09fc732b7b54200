"""fusedres predict: a page of predictions."""

from dataclasses import replace

import pytest

from fusedres.commands.predict import Row, page, predictions
from fusedres_cli.main import main


def test_a_row_for_each_gpu_batch_and_kind_of_step():
    rows = list(predictions("cifar_resnet20", ["h100"], [8, 512], "bf16"))
    assert [(row.infer, row.gpu, row.batch) for row in rows] == [
        (infer, gpu, batch) for infer in (False, True) for gpu in ["h100"] for batch in (8, 512)
    ]
    for row in rows:
        for fast, central, slow in (row.eager, row.auto):
            assert 0 < fast <= central <= slow
        assert row.gain >= 1
        assert (row.saved_mb == 0) is row.infer
        assert len(row.choices) >= 9


def test_the_page_says_that_nothing_was_measured_and_joins_layers_alike():
    choices = (("stem", "block_end"), ("layer1.0", "moments"), ("layer1.1", "moments"), ("layer2.0", "stats"))
    row = Row("h100", 256, False, (49.0, 55.5, 63.0), (27.0, 32.0, 44.0), 320, 2, 25.4, choices)
    text = page("resnet50", "bf16", [row])
    assert "**Predicted, not measured**" in text
    assert (
        "| h100 | 256 | 55.5 (49-63) | 32 (27-44) | 1.73 x | 8,000 | 320 (2) | 25.4 "
        "| stem block_end, layer1.0-layer1.1 moments, layer2.0 stats |"
    ) in text
    assert "Inference" not in text and "measured on that GPU" not in text
    text = page("resnet50", "bf16", [replace(row, measured=True)])
    assert "| h100 * | 256 |" in text and "*: by constants of the model that were measured on that GPU" in text


def test_the_command(tmp_path, capsys):
    out = tmp_path / "page.md"
    assert main(["predict", "cifar_resnet20", "--gpus", "l40s", "--batches", "4", "--out", str(out)]) == 0
    assert out.read_text().count("| l40s | 4 |") == 2
    assert main(["predict", "cifar_resnet20", "--gpus", "l41s"]) == 2
    assert "gpu: expected a name such as l40s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", "--batches", "4,x"])
    assert "expected a whole number of at least 1" in capsys.readouterr().err
