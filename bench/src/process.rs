//! The daemon under load, in a process of its own, and what processes spend of the processors.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

/// A daemon that ends with this program.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    endpoint: String,
}

impl Daemon {
    /// Starts `binary`, or the one beside this program, over the MongoDB at `uri`.
    pub(crate) fn start(binary: Option<PathBuf>, uri: &str) -> Result<Self> {
        let beside = || Ok::<_, anyhow::Error>(std::env::current_exe()?.with_file_name("leased"));
        let binary = binary.map_or_else(beside, Ok)?;
        let mut child = Command::new(&binary)
            .args([
                "--listen=127.0.0.1:0",
                "--http-listen=off",
                "--mongodb-database=leased-bench",
                "--log-level=warn",
            ])
            .env("LEASED_MONGODB_URI", uri)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("cannot run {}; build it with cargo build --release", binary.display())
            })?;
        let mut ready = String::new();
        BufReader::new(child.stdout.take().context("the daemon's output")?).read_line(&mut ready)?;
        let address = ready.split_whitespace().find_map(|word| word.strip_prefix("grpc="));
        let endpoint = format!("http://{}", address.context("the daemon did not become ready")?);
        Ok(Self { child, endpoint })
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Processor time at an instant, by process; this program is one of them.
#[derive(Debug)]
pub(crate) struct Cpu(Vec<(&'static str, u32, Duration)>);

impl Cpu {
    pub(crate) fn now(processes: &[(&'static str, Option<u32>)]) -> Self {
        let own = ("load", Some(std::process::id()));
        let known = processes.iter().copied().chain([own]).filter_map(|(name, id)| Some((name, id?)));
        Self(known.filter_map(|(name, id)| Some((name, id, cpu_time(id)?))).collect())
    }

    /// What each has spent since.
    pub(crate) fn spent(self) -> Vec<(&'static str, Duration)> {
        let since = |(name, id, before): (_, u32, Duration)| {
            (name, cpu_time(id).unwrap_or(before).saturating_sub(before))
        };
        self.0.into_iter().map(since).collect()
    }
}

/// User and system time from `/proc`, where there is one.
fn cpu_time(id: u32) -> Option<Duration> {
    /// The kernel's `USER_HZ`, which is 100 on every architecture that Rust runs on with Linux.
    const TICK: Duration = Duration::from_millis(10);
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u32 = fields.get(11)?.parse::<u32>().ok()? + fields.get(12)?.parse::<u32>().ok()?;
    Some(TICK * ticks)
}
