"""Every encoder that is known by name, and modules of the user's own."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import histovar as hv
from histovar.encoders import _checkpoints
from histovar.encoders.features import Features


def features(encoder, device="cpu"):
    """An encoder with random weights."""
    with torch.device(device):
        return Features(encoder, _checkpoints.architecture(encoder)).eval()


@pytest.mark.parametrize("name", hv.encoders.ENCODERS)
def test_every_encoder_is_built_as_declared(name):
    """Built as declared, without weights: input size, layers, width; and what a user must know of it is there."""
    encoder = hv.encoders.get(name)
    assert encoder.name == name
    assert encoder.licence and encoder.citation.startswith(("doi:10.", "arXiv:", "https://"))
    assert encoder.hub.count("/") == 1
    with torch.device("meta"):  # shapes alone: some have a billion weights
        network = features(encoder, "meta")
        embedding = network(torch.empty(2, encoder.input_px, encoder.input_px, 3))
    assert embedding.shape == (2, encoder.width)
    assert embedding.dtype == torch.float32
    depth = len(network.module.blocks)
    assert [(layer + 1) / depth for layer in encoder.layers] == [0.5, 0.75]


def test_default_is_free_and_middle_layers():
    encoder = hv.encoders.get("dinov2_vits14")
    assert not encoder.gated and encoder.licence == "Apache-2.0"
    assert encoder.layers == (5, 8) and encoder.width == 1536
    table = hv.encoders.describe()
    assert list(table.index) == list(hv.encoders.ENCODERS)
    assert table.loc["uni", "gated"] and not table.loc["dinov2_vits14", "gated"]


def small_encoder(**changes):
    return hv.encoders.Encoder(
        **{
            "name": "small",
            "architecture": "vit_tiny_patch16_224",
            "options": {"depth": 3, "img_size": 32, "dynamic_img_size": True},
            "input_px": 32,
            "layers": (0, 2),
            "pooling": "mean_std",
            "token_width": 192,
            **changes,
        }
    )


def test_pooling_is_of_patch_tokens_of_the_layers():
    torch.manual_seed(0)
    network = features(small_encoder())
    patches = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    tokens = []
    for block in (0, 2):
        network.module.blocks[block].register_forward_hook(lambda module, given, output: tokens.append(output[:, 1:]))
    with torch.inference_mode():
        embedding = network(patches)
    expected = [value for t in tokens for value in (t.mean(1), t.std(1, correction=0))]
    torch.testing.assert_close(embedding, torch.cat(expected, 1))
    with torch.inference_mode():
        means = Features(small_encoder(pooling="mean"), network.module)(patches)
    torch.testing.assert_close(means, torch.cat(expected[::2], 1))


def test_output_is_what_the_encoder_returns():
    network = features(small_encoder(layers=(), pooling="output"))
    patches = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    images = (patches.permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.inference_mode():
        torch.testing.assert_close(network(patches), network.module(images))


def test_local_checkpoint(tmp_path):
    source = features(small_encoder())
    state = source.module.state_dict()
    save_file({**state, "head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}, tmp_path / "w.safetensors")
    loaded = Features.load(small_encoder(), tmp_path / "w.safetensors")
    for name, value in loaded.module.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_checkpoint_of_another_network_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"weights: .*other.safetensors' is not a checkpoint of small"):
        Features.load(small_encoder(), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"weights: .*broken.safetensors' cannot be read as a checkpoint"):
        Features.load(small_encoder(), tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="weights: no file"):
        Features.load(small_encoder(), tmp_path / "nowhere.safetensors")


def test_checkpoint_of_transformers_gives_the_same_tokens(tmp_path):
    """Phikon-v2 is published for transformers; converted, timm's network computes the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=192, num_hidden_layers=3, num_attention_heads=3, patch_size=16, image_size=32
    )
    theirs = transformers.Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    options = {"depth": 3, "img_size": 32, "init_values": 1.0}
    encoder = small_encoder(options=options, convert=_checkpoints.from_transformers)
    ours = Features.load(encoder, tmp_path / "model.safetensors").module
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = theirs(images, output_hidden_states=True).hidden_states
        tokens = ours.forward_intermediates(
            images, indices=[0, 2], norm=False, output_fmt="NLC", intermediates_only=True
        )
    for layer, found in zip((0, 2), tokens, strict=True):
        torch.testing.assert_close(found, expected[layer + 1][:, 1:], rtol=1e-4, atol=1e-4)


def test_trunk_of_conch():
    state = {"visual.trunk.cls_token": torch.zeros(1), "text.weight": torch.zeros(1), "visual.proj": torch.zeros(1)}
    assert list(_checkpoints.conch_trunk(state)) == ["cls_token"]


class _Hub(BaseHTTPRequestHandler):
    """A hub that gives nobody access to gated repositories."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def at_hub(monkeypatch, tmp_path, endpoint):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_gated_encoder_without_access(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        at_hub(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(
            PermissionError,
            match=r"^encoder: you have no access to the weights of 'uni' .*huggingface.co/MahmoodLab/UNI",
        ) as e:
            Features.load(hv.encoders.get("uni"))
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(e.value) and "weights=" in str(e.value) and "hf auth login" in str(e.value)


def test_no_network(monkeypatch, tmp_path):
    at_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^encoder: the weights of 'dinov2_vits14' cannot be downloaded") as e:
        Features.load(hv.encoders.get("dinov2_vits14"))
    assert "\n" not in str(e.value) and "weights=" in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "layers: .* need at least one"),
        ({"layers": (-1,)}, "layers"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"pooling": "max"}, "pooling"),
        ({"architecture": ""}, "architecture"),
        ({"input_px": 0}, "input_px"),
    ],
)
def test_wrong_encoder(changes, message):
    with pytest.raises(ValueError, match=message):
        small_encoder(**changes)


def test_unknown_encoder():
    with pytest.raises(KeyError, match=r"name: no encoder 'dino'; known are \['conch'"):
        hv.encoders.get("dino")


def test_module_that_returns_no_features():
    network = Features(hv.encoders.Encoder(name="maps", module=torch.nn.Conv2d(3, 2, 1)), torch.nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match=r"encoder: 'maps' returns \(1, 2, 8, 8\) for 1 images"):
        network(torch.from_numpy(np.zeros((1, 8, 8, 3), np.uint8)))
