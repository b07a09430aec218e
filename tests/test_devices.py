"""No loop makes the host wait for a device: run on meta tensors, which have no values to wait for."""

from pathlib import Path

import pytest
import torch
import torchgen
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml

from histovar.model import Decoding, GeneVARTransformer, Histology, ModelConfig, TwoStageVARST
from histovar.model.decoding import pieces_of_spots
from histovar.model.observation import Composition, Observation
from histovar.training import TrainingOptions
from histovar.training.stage1 import Stage1Module
from histovar.training.stage2_modules import PriorModule, Stage2Module

from .conftest import small_config

NOWHERE = {"device": "meta"}
N_SPOTS, N_GENES = 5, 30
OPTIONS = TrainingOptions(enable_progress_bar=False)


KINDS = [({}, True), ({}, False), ({"order": "token"}, True), ({"attention_limit": 1}, True)]


@pytest.fixture(params=KINDS, ids=["scale", "values", "token", "wide"])
def model(request):
    changes, of_rates = request.param
    # Dead codes are revived by vector-quantize-pytorch, which does wait.
    model = TwoStageVARST(small_config(embedding_dims=(16,), dead_code_threshold=0, **changes))
    model.stage1.start_codebook(torch.rand(200, N_GENES))
    model.stage1.code_counts += 1
    model.stage2.head.set_codes(model.stage1)
    model.stage2.prior.set_trained(of_rates=of_rates, n_folds=3)
    return model.to("meta")


def inputs(config):
    sources = tuple(torch.empty(N_SPOTS, width, **NOWHERE) for width in config.aligned_dims)
    nothing = torch.empty(N_SPOTS, 0, **NOWHERE)
    return Histology(sources, nothing, nothing, torch.empty(N_SPOTS, **NOWHERE))


def without_mps_kernel():
    """Names of torch's operations that MPS cannot do, by the table from which torch is built; older ones had more."""
    if Version(torch.__version__) < Version("2.13"):
        return set()
    tables = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(tables / "native_functions.yaml"), str(tables / "tags.yaml"))
    kernels = [index for key, index in parsed.backend_indices.items() if key.name == "MPS" or "Composite" in key.name]
    functions = {str(function.func.name): function for function in parsed.native_functions}
    doing = {name: functions[str(f.structured_delegate or name)] for name, f in functions.items()}
    return {f"aten::{name}" for name, f in doing.items() if not any(index.has_kernel(f) for index in kernels)}


class LikeMPS(TorchDispatchMode):
    """Refuses what MPS does not have: 64-bit floats, and operations without a kernel."""

    absent = without_mps_kernel()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.name() not in self.absent
        made = operation(*args, **(kwargs or {}))
        doubles = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.dtype == torch.double]
        assert not doubles, operation
        return made


@pytest.mark.parametrize("mode", ["expected", "greedy", "sample"])
def test_generation_never_waits(model, mode):
    with LikeMPS():
        made = model.eval().predict(inputs(model.config), Decoding(mode))
    assert made.expression.is_meta and made.expression.shape == (N_SPOTS, N_GENES)


def test_calibration_never_waits(model):
    calibration = model.stage2.calibration
    mean, std = torch.empty(2, N_SPOTS, N_GENES, **NOWHERE)
    draws = torch.empty(N_SPOTS, N_GENES, 7, **NOWHERE)
    with LikeMPS():
        assert calibration.quantiles(mean, std, (0.05, 0.95)).shape == (N_SPOTS, N_GENES, 2)
        assert calibration.draws(draws, mean, std).shape == draws.shape


@pytest.mark.parametrize("units", ["lognorm", "log_counts", "counts", "rates"])
@pytest.mark.parametrize("known", [True, False])
def test_observation_never_waits(units, known):
    observation = Observation(N_GENES).to("meta")
    number = torch.empty(N_SPOTS, **NOWHERE)
    composition = Composition(torch.empty(N_SPOTS, N_GENES, **NOWHERE), number, number, number)
    depth = number if known else None
    with LikeMPS():
        mean, std = observation.moments(composition, units, depth)
        values = observation.at_levels(observation.points(composition, units, depth), (0.05, 0.95))
    assert mean.shape == std.shape == values.shape[:2] == (N_SPOTS, N_GENES)


@pytest.mark.filterwarnings("ignore:.*self.log")
def test_training_never_waits(model):
    tokens = torch.empty(N_SPOTS, model.config.n_tokens, dtype=torch.long, **NOWHERE)
    genes, folds = torch.empty(N_SPOTS, N_GENES, **NOWHERE), torch.empty(N_SPOTS, dtype=torch.long, **NOWHERE)
    number = torch.empty(N_SPOTS, **NOWHERE)
    batch = inputs(model.config), tokens, genes, folds, number, number[:, None], genes
    modules = PriorModule(model, OPTIONS), Stage2Module(model, OPTIONS), Stage1Module(model, OPTIONS)
    for module, given in zip(modules, (batch, batch, (genes,)), strict=True):
        with LikeMPS():
            loss = module.to("meta").train().training_step(given, 0)
            loss.backward()
        assert loss.is_meta


def test_large_batches_go_through_the_transformer_in_pieces_that_fit():
    with torch.device("meta"):
        transformer = GeneVARTransformer(ModelConfig.reference(n_layers=2))
    pieces = pieces_of_spots(65_536, transformer)
    assert pieces[0].start == 0 and pieces[-1].stop >= 65_536 and len(pieces) > 1
    assert all(one.stop == other.start for one, other in zip(pieces[:-1], pieces[1:], strict=True))
    hidden_bytes = 4 * 241 * transformer.config.feedforward * (pieces[0].stop - pieces[0].start)
    assert 2**30 < hidden_bytes < 2**34
    assert pieces_of_spots(64, transformer) == [slice(0, pieces[0].stop)]


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="MPS lacked more operations before torch 2.13")
def test_operations_that_mps_lacks_are_known():
    assert "aten::special_ndtri" in LikeMPS.absent and "aten::erfinv" not in LikeMPS.absent


def test_what_would_wait_is_an_error():
    with pytest.raises(RuntimeError):
        bool(torch.empty((), **NOWHERE) > 0)
