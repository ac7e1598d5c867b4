import numpy as np
import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Pair, load_metric
from sd35bench.metrics.lpips import Lpips, cached_weights
from sd35bench.score import score_study
from sd35bench.study.store import Study
from tests.metrics.doubles import pictures
from tests.metrics.drifted import load, nudge, put

A, B = pictures(2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """AlexNet's features with random weights: the paper's formula does not ask what they are."""
    import torch
    from torchvision.models import alexnet

    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def lpips(weights):
    return Lpips(weights)


def _paper(image, reference, weights) -> float:
    """Zhang et al. 2018, equation 1, with the authors' input scaling and channel weights."""
    from pathlib import Path

    import torch
    from torchmetrics.functional.image import lpips
    from torchvision.models import alexnet

    with torch.device("meta"):  # drawing 61 million weights takes a second
        net = alexnet(weights=None).features.eval()
    net.load_state_dict({k[9:]: v for k, v in torch.load(weights).items()}, assign=True)
    path = Path(lpips.__file__).parent / "lpips_models" / "alex.pth"
    heads = torch.load(path, map_location="cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x = [
        ((torch.tensor(i).permute(2, 0, 1) / 127.5 - 1 - shift) / scale)[None]
        for i in (image, reference)
    ]
    total, head = 0.0, 0
    with torch.no_grad():
        for layer in net[:12]:
            x = [layer(y) for y in x]
            if isinstance(layer, torch.nn.ReLU):
                unit = [y / y.norm(dim=1, keepdim=True).clamp_min(1e-4) for y in x]
                weighted = (unit[0] - unit[1]) ** 2 * heads[f"lin{head}.model.1.weight"]
                total += float(weighted.sum(1).mean())
                head += 1
    assert head == 5
    return total


def test_lpips_is_the_papers_formula(lpips, weights):
    ours = lpips(A, B)
    assert ours == pytest.approx(_paper(A, B, weights), rel=1e-4)
    assert ours > 0


def test_lpips_of_equal_images_is_0_and_swapped_channels_are_seen(lpips):
    assert lpips(A, A.copy()) == 0.0
    assert lpips(A[:, :, ::-1].copy(), A) > 0.01


def test_lpips_refuses_floats_and_has_no_value_for_tiny_images(lpips):
    with pytest.raises(MetricError, match="uint8"):
        lpips(A.astype(np.float32), B)
    assert lpips(A[:31], B[:31]) is None
    assert lpips(A[:32, :32], B[:32, :32]) > 0


def test_file_that_is_not_alexnet_is_refused_by_name(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(MetricError, match=r"alexnet-owt-7be5be79\.pth, which LPIPS needs"):
        Lpips(tmp_path / "w.pth")(A, B)


def test_drift_has_lpips_where_weights_are_and_says_which(lpips, weights):
    metric = load_metric("drift", lpips=str(weights))
    value = metric.score_pair(Pair(image=A, reference=B))
    assert value.detail["lpips"] == lpips(A, B)
    from tests.studies.memory import record

    about = metric.about(record(0), record(1))
    assert about["lpips_weights"] == lpips.digest
    other = metric.about(record(0), record(1)) | {"lpips_weights": None}
    assert about != other  # scores without it are stale


def test_drift_takes_weights_from_torchs_cache_and_does_without(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    without = load_metric("drift")
    assert without.lpips is None
    assert "lpips" not in without.score_pair(Pair(image=A, reference=B)).detail
    cached_weights().parent.mkdir(parents=True)
    cached_weights().write_bytes(weights.read_bytes())
    assert load_metric("drift").lpips.digest == Lpips(weights).digest


def test_torchs_cache_is_where_torch_says(monkeypatch, tmp_path):
    import torch

    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv("TORCH_HOME", raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        assert str(cached_weights().parents[1]) == torch.hub.get_dir()


def test_weights_that_are_not_there_are_the_users_error(tmp_path):
    with pytest.raises(ConfigError, match=r"metric\.drift\.lpips="):
        load_metric("drift", lpips=str(tmp_path / "none.pth"))


def test_lpips_of_a_study_is_in_its_drift_table(tmp_path, lpips, weights):
    study = Study.open(tmp_path, "s", create=True)
    images = pictures(3)
    put(study, images, load("eager"))
    put(study, [nudge(i) for i in images], load("compile"))
    score_study(study, ["drift"], options={"drift": {"lpips": str(weights)}})
    (row,) = show_document(study)["drift"]["rows"]
    expected = np.mean([lpips(nudge(i), i) for i in images])
    assert row["lpips"]["value"] == pytest.approx(expected)
    assert row["lpips"]["n"] == 3


def test_score_says_how_to_get_lpips_where_it_is_left_out(tmp_path, monkeypatch, capsys, weights):
    from sd35bench.cli import main

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    study = Study.open(tmp_path, "s", create=True)
    put(study, pictures(1), load("eager"))
    put(study, [nudge(i) for i in pictures(1)], load("compile"))
    words = ["score", "s", "--metric", "drift", "--results-dir", str(tmp_path)]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "drift: without LPIPS; for it put torchvision's" in said
    assert "download.pytorch.org/models/alexnet-owt-7be5be79.pth" in said
    assert main([*words, f"metric.drift.lpips={weights}"]) == 0
    assert "without LPIPS" not in capsys.readouterr().out
