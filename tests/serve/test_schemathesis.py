"""Generated requests against our own OpenAPI document: no failure of the server, and only what is declared.

That wrong types are refused is not asked: "1" is read as a number and 0 as false, as clients expect.
"""

from __future__ import annotations

import schemathesis
from fake_sampler import FakeSampler
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer
from step35.serve.app import create_app

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
TOKENIZER = Tokenizer.load(SHIPPED)
TEXTS = ["Hm.\n</think>\nHello", "</think><tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>"]
APP = create_app(FakeSampler(TOKENIZER, TEXTS), TOKENIZER, model_name="tiny", settings=ServeSettings())
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


@SCHEMA.parametrize()
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_is_answered_is_declared(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)
