//! mongolock, a library in Python. Its load comes from a program in Python with several processes.

use std::fs;
use std::io::{Write, stderr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use throwaway_mongodb::Guardian;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::cpu::{Cpu, LOAD};
use crate::sample::Sample;
use crate::server::{beside, new_folder};
use crate::trial::Trial;
use crate::workload::Workload;

const LOAD_PROGRAM: &str = include_str!("../mongolock.py");
const REQUIREMENTS: &str = include_str!("../mongolock.txt");

/// What the program in Python prints at its end.
#[derive(Debug, Deserialize)]
struct Said {
    done: u64,
    errors: u64,
    /// For how long the program counted.
    seconds: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// The processor time of its processes meanwhile, in seconds.
    cpu: f64,
}

pub(crate) async fn run(trial: &Trial<'_>) -> Result<Sample> {
    let packages = spawn_blocking(packages).await??;
    let (work, rate) = match trial.workload {
        Workload::Pairs => ("pairs", "pairs/s"),
        _ => ("touches", "acks/s"),
    };
    let folder = new_folder()?;
    fs::write(folder.join("mongolock_load.py"), LOAD_PROGRAM)?;
    let mut command = Command::new("env");
    command.arg(format!("PYTHONPATH={}", packages.display())).args(["python3", "-u"]);
    command.arg(folder.join("mongolock_load.py")).args([trial.deployment.address()?, work]);
    command.args([trial.scale.to_string(), trial.time.as_secs_f64().to_string(), Trial::prefix()]);
    let cpu = Cpu::now(&trial.deployment.processes());
    let (start, mut guardian) = (Instant::now(), Guardian::new(&folder, &command)?);
    guardian.start()?;
    while guardian.is_running()? {
        sleep(Duration::from_millis(50)).await;
    }
    // The database's processor time covers the whole run, in which the database does little else.
    let (time, mut spent) = (start.elapsed(), cpu.spent());
    let output = fs::read_to_string(folder.join("output"))?;
    let last = output.trim().lines().last().context("the program in Python printed nothing")?;
    let Ok(said) = serde_json::from_str::<Said>(last) else { bail!("python3 printed: {last}") };
    ensure!(said.done > 0, "nothing was done in time");
    spent.retain(|(kind, _)| *kind != LOAD);
    let mut sample = Sample::default().spending(&spent, time);
    sample.cpu.push((LOAD, said.cpu / said.seconds));
    #[expect(clippy::cast_precision_loss, reason = "a count of turns is far below 2^52")]
    sample.note(rate, said.done as f64 / said.seconds);
    sample.note("p50 ms", said.p50_ms);
    sample.note("p99 ms", said.p99_ms);
    sample.errors = said.errors;
    Ok(sample)
}

/// Returns a folder with the packages, and fetches them the first time. A virtual environment would
/// need more parts of Python than pip.
fn packages() -> Result<PathBuf> {
    let packages = beside("mongolock-1.3.4")?;
    if packages.is_dir() {
        return Ok(packages);
    }
    let _ = writeln!(stderr(), "fetching mongolock, once");
    let work = new_folder()?;
    fs::write(work.join("requirements.txt"), REQUIREMENTS)?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]);
    pip.args(["--requirement", "requirements.txt", "--target", "packages"]).current_dir(&work);
    let output = pip.stdin(Stdio::null()).output().context("python3 cannot be run")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("pip printed: {}", said.trim().lines().last().unwrap_or_default());
    }
    // The rename is the last step, so the folder is either complete or missing.
    fs::rename(work.join("packages"), &packages)?;
    let _ = fs::remove_dir_all(work);
    Ok(packages)
}
