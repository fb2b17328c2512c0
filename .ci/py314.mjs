// The tests of all that does no I/O, on CPython 3.14 as Pyodide brings it: WebAssembly in Node.js.
//
//     ulimit -s 65000; node --stack-size=60000 .ci/py314.mjs FOLDER [PYTEST_ARGS...]
//
// FOLDER is absolute and has Pyodide in node_modules and pytest in site-packages, as `make
// test-314` puts them there. Deeply nested JSON overflows the stack of 1 MB that Node.js has.
// There are no threads and no sockets; tests of these classes that need them have the marker
// needs_threads.

import { fileURLToPath, pathToFileURL } from "node:url";

const [folder, ...options] = process.argv.slice(2);
const mounts = {
  "/project": fileURLToPath(new URL("..", import.meta.url)),
  "/site-packages": `${folder}/site-packages`,
};

function mountFolders(FS) {
  for (const [place, root] of Object.entries(mounts)) {
    FS.mkdir(place);
    FS.mount(FS.filesystems.NODEFS, { root }, place);
  }
  FS.chdir("/project");
}

const runTests = String.raw`
import re
import sys

import ogx
import pytest

MIN_PASSED = 1500  # of all tests; fewer mean that the classes were not found


class Passed:
    number = 0

    def pytest_runtest_logreport(self, report):
        self.number += report.when == "call" and report.passed


def classes_above_the_line():
    with open("ogx.py", encoding="utf-8") as file:
        above, line, _ = file.read().partition("# ======== Above this line nothing does I/O")
    assert line, "ogx.py has lost the line above which nothing does I/O"
    sections = re.findall("^# ======== (.+?) =+$", above, re.M)
    return ["test_ogx.py::Test" + "".join(word[0].upper() + word[1:] for word in s.split()) for s in sections]


print("Python", sys.version.split()[0], "on", sys.platform)
names_tests = any(".py" in option for option in options)
passed = Passed()
code = pytest.main(["-m", "not needs_threads", *([] if names_tests else classes_above_the_line()),
                    *options], plugins=[passed])
if code == 0 and not options and passed.number < MIN_PASSED:
    print(f"only {passed.number} tests passed, where at least {MIN_PASSED} are expected")
    code = 1
int(code)
`;

try {
  const { loadPyodide } = await import(pathToFileURL(`${folder}/node_modules/pyodide/pyodide.mjs`));
  const python = await loadPyodide({
    env: { PYTHONPATH: Object.keys(mounts).join(":"), PYTHONDONTWRITEBYTECODE: "1" },
    fsInit: mountFolders,
  });
  process.exitCode = python.runPython(runTests, { globals: python.toPy({ options }) });
} catch (error) {
  // Uncaught, it would be shown with the line of Pyodide that raised it, which has a megabyte.
  console.error(error.stack);
  process.exitCode = 1;
}
