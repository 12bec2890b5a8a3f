"""What is derived holds on inputs that were not traced; each kind of group is found where the theory says so."""

from __future__ import annotations

from collections import Counter

from derive_models import causal, examples, tokens

from invariance.model.derive import Certificate, Derived, Kind, Probe, certify, derive

PROBES = [Probe("unseen", tokens(4, 11, seed=7)), Probe("loud", tokens(4, 11, seed=8), loud=4.0)]


def certified(kind: str, **more) -> tuple[Derived, Certificate]:
    model = causal(kind, **more)
    derived = derive(model, examples())
    return derived, certify(model, derived, PROBES)


def found(certificate: Certificate) -> Counter:
    return Counter((b.stem, b.kind, len(b.classes)) for b in certificate.blocks)


def test_llama_has_every_group_that_the_theory_names() -> None:
    derived, certificate = certified("llama")
    assert certificate.passed and not certificate.refuted
    assert not derived.unseen and not derived.unfolded and len(derived.gains) == 5
    assert found(certificate) == {
        ("residual", Kind.O, 32): 1,
        ("vo", Kind.GL, 8): 4,
        ("qk", Kind.C, 2): 16,
        ("ch", Kind.PERM, 40): 2,
        ("heads", Kind.NODES, 3): 2,
    }
