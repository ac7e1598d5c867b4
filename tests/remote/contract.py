"""What every provider must do, whatever its wire; adding one is one line in `PROVIDERS`."""

import asyncio
import dataclasses
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd35bench.errors import RemoteError
from sd35bench.remote.providers import provider_class
from sd35bench.remote.providers.base import Phase, Prediction, Provider, RemoteSettings, Upload
from sd35bench.remote.transport import Transport
from sd35bench.types import Request, SkipLayerGuidance
from tests.remote.fault_server import SIZES, FaultServer
from tests.remote.other_hosts import SERVERS

__all__ = ["ProviderContract", "make_provider", "make_request", "remote_settings"]

KEY = "canary-key-1234"
GUIDANCE = SkipLayerGuidance(layers=(7,), scale=2.5, start=0.0, stop=0.2)
NAMES = """id predictionID status output error logs metrics predict_time cost input created_at
started_at executions results next total_count offset presigned_url public_url required_headers url
images image job state"""
WORDS = re.findall(r"\w+", NAMES)
VALUES = ["success", "succeeded", "https://x.y/z.png", "2024-01-01T00:00:00Z", "1e400", "p-1"]
READERS = ("read_created", "read_prediction", "read_result", "read_listing", "read_presigned")
POLLED = Prediction(id="p-1", phase=Phase.READY)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
JSON = st.recursive(
    SCALARS | st.sampled_from(VALUES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=8)
    ),
    max_leaves=20,
)


def remote_settings(provider: str, base_url: str, **changes: Any) -> RemoteSettings:
    ratios = {size: ratio for ratio, size in SIZES.items()}
    values = {"slug": "owner/model", "allow_loopback": True, "aspect_ratios": ratios}
    values |= {"default_steps": 4, **changes}
    return RemoteSettings(provider=provider, base_url=base_url, **values)


def make_provider(name: str, base_url: str = "http://127.0.0.1:1", **changes: Any) -> Provider:
    return provider_class(name)(remote_settings(name, base_url, **changes))


def make_request(**changes: Any) -> Request:
    values = {
        "prompt": "a red circle",
        "steps": 4,
        "cfg": 5.0,
        "seed": 7,
        "width": 88,
        "height": 48,
    }
    return Request(**{**values, **changes})


class ProviderContract:
    """Subclasses give `names`, and servers that speak them."""

    def speaks(self, name: str) -> type[FaultServer]:
        return SERVERS.get(name, FaultServer)

    def test_it_names_itself_and_fields_that_exist(self, name):
        provider = make_provider(name)
        assert provider.name == name
        assert provider.base_url.startswith("https://")
        assert not provider.base_url.endswith("/")
        assert provider.key_variable.isupper()
        assert set(provider.unsent) <= {field.name for field in dataclasses.fields(Request)}

    def test_the_key_is_in_one_header_and_nowhere_else(self, name):
        provider = make_provider(name)
        assert [KEY in value for value in provider.headers(KEY).values()].count(True) == 1
        assert provider.headers("") == {}
        inputs = provider.input(make_request(), None)
        now = datetime.now(UTC)
        calls = [provider.create(inputs)]
        calls += [] if provider.synchronous else [provider.poll("p-1")]
        calls += [provider.listing(now, now, None)] if provider.lists else []
        for call in calls:
            assert KEY not in f"{call}"
            assert call.path.startswith("/")
            assert call.method == ("POST" if call is calls[0] else "GET")
            assert all(isinstance(value, str) for value in call.query.values())

    def test_every_parameter_is_explicit(self, name):
        """What is sent differs whenever the request does, or the request is refused by name.

        A field that is `unsent` changes nothing that is sent.
        """
        provider = make_provider(name)
        first = provider.input(make_request(), None)
        changed = {
            "prompt": "x",
            "steps": 5,
            "cfg": 6.0,
            "seed": 8,
            "output_format": "webp",
            "output_quality": 50,
        }
        for field, value in changed.items():
            asked = make_request(**{field: value})
            refusal = provider.refusal(asked)
            if refusal is not None:
                assert refusal.startswith(f"{field}={value}"), field
                continue
            other = provider.input(asked, None)
            if field in provider.unsent:
                assert other == first, field
                continue
            assert other != first, field
            assert not provider.same_input(other, first), field
        assert provider.input(make_request(width=48, height=88), None) != first

    def test_an_init_image_goes_with_its_strength_and_neither_without(self, name):
        provider = make_provider(name)
        with_image = make_request(init_image="0" * 64, prompt_strength=0.6)
        refusal = provider.refusal(with_image)
        if refusal is not None:
            assert refusal.startswith("init_image")
            return
        sent = provider.input(with_image, "https://example.com/a.png")
        assert "https://example.com/a.png" in sent.values()
        assert 0.6 in sent.values()
        assert not {"https://example.com/a.png", 0.6} & set(
            provider.input(make_request(), None).values()
        )
        with pytest.raises(ValueError, match="URL"):
            provider.input(with_image, None)

    @pytest.mark.parametrize(
        "changes",
        [
            {"negative_prompt": "blurry"},
            {"prompt_3": ""},
            {"prompt_weights": "red:1.2"},
            {"skip_layer_guidance": GUIDANCE},
            {"sampler": "heun"},
            {"shift": 2.0},
            {"max_sequence_length": 77},
            {"width": 72, "height": 72},
        ],
        ids=lambda changes: "-".join(changes),
    )
    def test_what_cannot_be_asked_for_is_refused_by_name(self, name, changes):
        provider, asked = make_provider(name), make_request(**changes)
        said = provider.refusal(asked)
        if said is None:  # then it is sent
            assert provider.input(asked, None) != provider.input(make_request(), None)
            assert not set(changes) & set(provider.unsent)
        else:
            assert next(iter(changes)) in said
        assert provider.refusal(make_request()) is None

    @pytest.mark.parametrize("reader", READERS)
    def test_any_json_is_read_or_a_remote_error(self, name, reader):
        provider = make_provider(name)

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(body=JSON)
        def read(body):
            check_reader(provider, reader, body)

        if getattr(type(provider), reader) is getattr(Provider, reader):
            check_reader(provider, reader, {})  # it has none, and says so
        else:
            read()

    @pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
    def test_a_prediction_lives_on_a_real_server(self, name, fails):
        async def main() -> None:
            async with self.speaks(name)(fails=fails, cost_usd=0.035) as server:
                provider = make_provider(name, server.url)
                inputs = provider.input(make_request(), None)
                transport = _transport(provider, server)
                reply = await transport.send(provider.create(inputs))
                created = ended = provider.read_created(reply.body)
                assert created.phase.is_over == provider.synchronous
                if not provider.synchronous:
                    ended = await _ended(provider, transport, created.id)
                assert ended.id == created.id
                if provider.lists:
                    assert ended.input is not None
                    assert provider.same_input(ended.input, inputs)
                assert server.created(inputs) == 1
                if fails:
                    assert ended.phase is Phase.FAILED
                    assert "the model failed" in str(ended.error) or not provider.lists
                    assert ended.error
                else:
                    assert ended.phase is Phase.SUCCEEDED
                    where = "data:image/" if provider.synchronous else server.url
                    assert ended.outputs[0].startswith(where)
                    if name != "stability":  # which says nothing of its time
                        assert ended.predict_s == pytest.approx(server.seconds)

        asyncio.run(main())

    def test_a_lost_create_is_found_among_strangers_on_a_later_page(self, name):
        if not make_provider(name).lists:
            return  # tests/remote/test_other_hosts.py has what becomes of it then

        async def main() -> None:
            async with self.speaks(name)(strangers=105) as server:
                provider = make_provider(name, server.url)
                inputs = provider.input(make_request(), None)
                transport = _transport(provider, server)
                sent = await transport.send(provider.create(inputs))
                wanted = provider.read_created(sent.body).id
                now = datetime.now(UTC)
                span = timedelta(minutes=5)
                page, found = None, []
                for _ in range(3):
                    call = provider.listing(now - span, now + span, page)
                    reply = await transport.send(call)
                    listed, page = provider.read_listing(reply.body)
                    found += listed
                    if page is None:
                        break
                assert page is None
                assert len(found) == 106
                matching = []
                for one in found[-3:]:
                    known = one.input
                    if known is None:
                        polled = await transport.send(provider.poll(one.id))
                        known = provider.read_prediction(polled.body).input
                    if provider.same_input(known or {}, inputs):
                        matching.append(one.id)
                assert matching == [wanted]

        asyncio.run(main())


def check_reader(provider: Provider, reader: str, body: Any) -> None:
    """Read it; what comes out is an error of ours or keeps the contract."""
    try:
        polled = (POLLED,) if reader == "read_result" else ()
        found = getattr(provider, reader)(body, *polled)
    except RemoteError as exc:
        message = str(exc)
    else:
        check_read(found, reader)
        return
    assert len(message) < 2000
    assert message.isprintable()


def check_read(found: Any, reader: str) -> None:
    if reader == "read_presigned":
        assert isinstance(found, Upload)
        assert all(isinstance(v, str) and v.isascii() for v in found.headers.values())
        return
    if reader == "read_listing":
        predictions, page = found
        assert page is None or (isinstance(page, str) and page)
    else:
        predictions = [found]
    for prediction in predictions:
        check_prediction(prediction, over_means_settled=reader != "read_listing")


def check_prediction(found: Prediction, over_means_settled: bool) -> None:
    assert 0 < len(found.id) <= 128
    assert not set(found.id) & set("/?#%\\ ")
    for number in (found.predict_s, found.queue_s, found.cost_usd):
        assert number is None or 0 <= number < 1e6
    assert all(url.startswith(("http", "data:image/")) for url in found.outputs)
    assert found.created_at is None or found.created_at.tzinfo is not None
    if over_means_settled:
        assert (found.phase is Phase.SUCCEEDED) == bool(found.outputs)
        assert (found.phase in (Phase.FAILED, Phase.CANCELLED)) == (found.error is not None)


def _transport(provider: Provider, server: FaultServer) -> Transport:
    return Transport(
        server.url, allow_loopback=True, headers=lambda: provider.headers(KEY), timeout_s=60
    )


async def _ended(provider: Provider, transport: Transport, prediction_id: str) -> Prediction:
    async with asyncio.timeout(60):
        while True:
            reply = await transport.send(provider.poll(prediction_id))
            found = provider.read_prediction(reply.body)
            if found.phase is Phase.READY:
                reply = await transport.send(provider.result(prediction_id))
                found = provider.read_result(reply.body, found)
            if found.phase.is_over:
                return found
            await asyncio.sleep(0.01)
