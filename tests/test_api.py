"""What `import plait` promises."""

from __future__ import annotations

import plait


def test_every_exported_name_is_there_and_documented() -> None:
    assert sorted(plait.__all__) == list(plait.__all__)
    for name in plait.__all__:
        exported = getattr(plait, name)
        assert getattr(exported, "__doc__", None) or name in ("Context", "Event"), f"{name} has no docstring"


def test_errors_pickle_and_keep_their_kind() -> None:
    import pickle

    from plait import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PlaitError)]
    assert len(classes) > 8
    for cls in classes:
        again = pickle.loads(pickle.dumps(cls("what happened")))
        assert type(again) is cls
        assert str(again) == "what happened"
