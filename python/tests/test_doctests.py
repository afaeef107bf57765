"""The examples in docstrings and stubs."""

import doctest
import re
from pathlib import Path

import lexico


def test_examples_in_docstrings_are_right():
    outcome = doctest.testmod(lexico)
    assert outcome.failed == 0 < outcome.attempted
    stubs = Path(lexico.__file__).with_name("_lexico.pyi").read_text()
    # A docstring's end would be taken for output.
    examples = doctest.DocTestParser().get_doctest(stubs.replace('"""', "\n"), {}, "_lexico.pyi", None, None)
    outcome = doctest.DocTestRunner().run(examples)
    assert outcome.failed == 0 < outcome.attempted


def test_all_that_is_native_has_a_stub():
    stubs = Path(lexico.__file__).with_name("_lexico.pyi").read_text()
    for name in dir(lexico._lexico):
        own = getattr(lexico._lexico, name)
        if name.startswith("_"):
            continue
        assert re.search(rf"^(class {name}\b|def {name}\(|{name}:)", stubs, re.M), name
        if isinstance(own, type) and own is not lexico.LexicoError:
            for method in vars(own):
                assert method.startswith("__") or f"def {method}(" in stubs, (name, method)


def test_importing_it_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, lexico; assert not {'torch', 'transformers', 'lmcache'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
