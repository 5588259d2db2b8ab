//! Tools of other languages: fetched once by their own installers, kept under `target/`, and shared by all tests.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The folder of the project.
pub(crate) fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A Python that has what `requirements`, a file of the project, names.
pub(crate) fn python(requirements: &str) -> PathBuf {
    let requirements = project().join(requirements);
    let content = fs::read(&requirements).unwrap();
    let folder = kept(&format!("python-{:x}", hash(&content)), |folder| {
        let python3 = or_else_install(
            Command::new("python3").args(["-m", "venv"]).arg(folder),
            "python3 with venv and pip",
        );
        assert!(
            python3.status.success(),
            "python3 cannot make a venv: {}",
            String::from_utf8_lossy(&python3.stderr)
        );
        let pip = Command::new(folder.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
            .arg(&requirements)
            .output();
        succeeded(pip.unwrap());
    });
    folder.join("bin/python")
}

/// Has what the lock file in `folder` names installed there, and returns a Node.js to run it.
pub(crate) fn node(folder: &str) -> PathBuf {
    let (node, npm) = nodejs();
    let folder = project().join(folder);
    let content = fs::read(folder.join("package-lock.json")).unwrap();
    kept(&format!("node-{:x}", hash(&(&content, &folder))), |_| {
        let mut command = Command::new(&npm);
        // Its first line may name a program that is beside it only.
        let path = std::env::join_paths(
            node.parent().map(Path::to_owned).into_iter().chain(std::env::split_paths(&path())),
        );
        command.args(["ci", "--no-audit", "--no-fund"]).current_dir(&folder).env("PATH", path.unwrap());
        succeeded(command.output().unwrap());
    });
    node
}

/// Node.js and npm: those on the `PATH`, or those that PyPI has.
fn nodejs() -> (PathBuf, PathBuf) {
    if let (Some(node), Some(npm)) = (found("node"), found("npm")) {
        return (node, npm);
    }
    let beside = python("tests/support/nodejs.txt");
    (beside.with_file_name("node"), beside.with_file_name("npm"))
}

fn found(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&path()).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn path() -> std::ffi::OsString {
    std::env::var_os("PATH").unwrap_or_default()
}

/// A folder under `target/` that `make` has filled, now or in an earlier run; one process at a time.
fn kept(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let tools = project().join("target/tools");
    fs::create_dir_all(&tools).unwrap();
    let (folder, done) = (tools.join(name), tools.join(format!("{name}.done")));
    let lock = File::create(tools.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    if !done.exists() {
        // What an interrupted run has left.
        drop(fs::remove_dir_all(&folder));
        make(&folder);
        File::create(done).unwrap();
    }
    folder
}

/// The output of a program that must be there.
fn or_else_install(command: &mut Command, what: &str) -> Output {
    command.output().unwrap_or_else(|error| panic!("this test needs {what}: install it ({error})"))
}

/// The output, if it ended well.
pub(crate) fn succeeded(output: Output) -> String {
    let (told, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{told}\n{wrong}", output.status);
    told.into_owned()
}

fn hash(content: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}
