"""What a report reads of runs, whatever they left."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from elsa_lightning.callbacks.journal import JOURNAL
from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.evaluation.compare import Score, to_dict
from elsa_lightning.reports.page import page
from elsa_lightning.reports.runs import read_runs

from ..callbacks.tiny import At, every_step, fit, stop
from .runs import STEPS, both, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_every_logger_tells_the_same(tmp_path: Path) -> None:
    board = run(tmp_path, *both(tmp_path))
    (of_board,), (of_table,) = read_runs([board]), read_runs([tmp_path / "table"])
    assert of_board.journal and not of_table.journal and "did not leave" in of_table.missing[0]
    shared = of_board.series.keys() & of_table.series.keys()
    assert {"loss", "val/perplexity", "elsa/primal_residual", "elsa/sparsity", "elsa/penalty"} <= shared
    for name in shared:
        assert of_board.series[name] == [(s, pytest.approx(v, rel=1e-5)) for s, v in of_table.series[name]]
    assert len(of_board.series["loss"]) == STEPS


def test_a_run_without_a_logger_has_its_notes(tmp_path: Path) -> None:
    (found,) = read_runs([run(tmp_path, logger=False)])
    assert [step for step, _ in found.series["loss"]] == list(range(2, STEPS + 1, 2))
    assert found.dense == 20.0 and found.sparse == 30.0
    assert found.sparsity == pytest.approx(0.9, abs=1e-3) and found.status == "finished"


def test_runs_below_a_folder_are_found_and_named_by_what_differs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / "sweep" / name, logger=False)
    assert [found.name for found in read_runs([tmp_path])] == ["a", "b"]
    assert len(read_runs([tmp_path, tmp_path / "sweep/a"])) == 2
    (alone,) = read_runs([tmp_path / "sweep/b" / JOURNAL])
    assert alone.folder == tmp_path / "sweep/b"


def test_a_run_that_was_resumed_is_one_from_its_beginning(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fit(first, every_step(first), At(7, stop))
    fit(second, every_step(second), resume=first / "7.ckpt")
    (found,) = read_runs([tmp_path])
    steps = [note["step"] for note in found.notes]
    assert steps == sorted(set(steps)) and steps[0] == 2 and steps[-1] == 20
    assert [step for step, _ in found.series["loss"]] == steps
    assert found.folder == second and found.status == "finished"
    seconds = [note["seconds"] for note in found.notes]
    assert seconds == sorted(seconds) and found.journal["seconds"] >= seconds[-1] - 1e-3
    assert len(read_runs([first, second])) == 2  # asked for
    shutil.rmtree(first)
    (found,) = read_runs([tmp_path])
    assert "7.ckpt, which is not there: its figures begin at step 7" in found.missing[0]


def export(folder: Path, record: dict[str, Any], form: str, **measured: float) -> Path:
    """Write what an export leaves, but for the model."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    told = {**record, "format": form, "speed": {"exported": 12.5}}
    (folder / "elsa.json").write_text(json.dumps({**told, "perplexity": {**record["perplexity"], **measured}}))
    return folder


def test_an_export_belongs_to_the_run_whose_model_it_is(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", logger=False)
    record = json.loads((folder / JOURNAL).read_text())["record"]
    sparse = export(tmp_path / "sparse", record, "cpu-sparse")
    rounded = export(tmp_path / "rounded", record, "quantized")
    measured = export(tmp_path / "measured", record, "quantized", exported=31.0)
    (tmp_path / "measured.tar.zst").write_bytes(b"0" * 100)
    (found,) = read_runs([folder, sparse, rounded, measured])
    assert [saved.perplexity for saved in found.saved] == [30.0, None, 31.0]
    assert [saved.archive for saved in found.saved] == [None, None, 100]
    assert found.smallest is not None and found.smallest.size == 1000
    assert found.fastest is not None and found.fastest.tokens_per_second == 12.5
    other = export(tmp_path / "of another", {**record, "command": "elsa fit other"}, "hf")
    _, alone = read_runs([folder, other])
    assert "without the run that made it" in alone.missing[0] and alone.sparse == 30.0


def test_an_export_of_a_checkpoint_belongs_to_the_run_that_left_it(tmp_path: Path) -> None:
    """Though the checkpoint knows neither the command nor the final perplexity."""
    one, other = (run(tmp_path / name, logger=False) for name in ("one", "other"))
    made = export(tmp_path / "made", {"run": str(other), "perplexity": {"dense": 20.0}}, "cpu-sparse")
    first, second = read_runs([one, other, made])
    assert not first.saved and [saved.folder for saved in second.saved] == [made]
    assert len(read_runs([one, made])) == 2


def test_what_was_evaluated_is_the_runs(tmp_path: Path) -> None:
    folder = run(tmp_path, logger=False)
    rows = to_dict([Score("boolq", "acc", 0.5, 0.1, 20)], [Score("boolq", "acc", 0.75, 0.1, 20)])
    (folder / "evaluation.json").write_text(json.dumps({"figures": rows}))
    (found,) = read_runs([folder])
    assert found.evaluations == rows
    pytest.importorskip("plotly", reason="plotly is not installed (the extra report)")
    assert re.search(r"boolq.*acc.*20.*0.7500 ± 0.1000.*0.5000 ± 0.1000.*-0.2500 ± 0.1414", page([found]), re.S)


def test_a_journal_that_cannot_be_read_loses_no_other_run(tmp_path: Path) -> None:
    folder, other = run(tmp_path / "a"), run(tmp_path / "b")
    (folder / JOURNAL).write_text('{"status": "fin')
    broken, whole = read_runs([folder, other])
    assert "cannot be read" in broken.missing[0] and broken.series["loss"]
    assert whole.status == "finished"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty/inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is no run and has none below it.*elsa fit"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(UnavailableError, match="does not exist: give the folder of a run"):
        read_runs([tmp_path / "nowhere"])


def test_a_run_may_be_resumed_into_its_own_folder(tmp_path: Path) -> None:
    run(tmp_path, logger=False)
    shutil.copy(next((tmp_path / "checkpoints").glob("*.ckpt")), tmp_path / "checkpoints/first.ckpt")
    again = run(tmp_path, logger=False, ckpt_path=str(tmp_path / "checkpoints/first.ckpt"), weights_only=True)
    found = read_runs([again])
    assert len(found) == 2 and sum(bool(one.journal.get("resumed_from")) for one in found) == 1
