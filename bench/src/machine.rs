//! Describes the machine and the programs on it, so that figures can be compared later.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use mongodb::bson::doc;
use serde::Serialize;
use tokio::time::Instant;

use crate::contender::Contender;
use crate::server::{Daemon, beside};

/// The machine, as results describe it.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    memory: String,
    kernel: String,
    /// How long writing and syncing 4 KiB takes on the disk with the servers' data, in
    /// milliseconds.
    sync_ms: Option<f64>,
    /// The programs and their versions.
    pub(crate) versions: Vec<String>,
}

impl Machine {
    /// Inspects this machine and the programs of the contenders. The version of a mongod is added
    /// when one runs.
    pub(crate) fn inspect(contenders: &[Contender], daemon: Option<&Path>) -> Self {
        let mut versions = Vec::new();
        if let Ok(leased) = (Daemon { program: daemon, ..Daemon::default() }).program() {
            versions.extend(first_line(Command::new(leased).arg("--version")));
        }
        if contenders.iter().any(|one| matches!(one, Contender::Etcd | Contender::EtcdThree)) {
            versions.extend(
                first_line(Command::new("etcd").arg("--version")).map(|said| said.replace(" Version:", "")),
            );
        }
        if contenders.contains(&Contender::Redis) {
            let version = first_line(Command::new("redis-server").arg("--version"));
            // Of "Redis server v=7.0.15 sha=.. malloc=..", only the version matters here.
            versions.extend(version.map(|said| said.split(" sha=").next().unwrap_or_default().to_owned()));
        }
        if contenders.contains(&Contender::Mongolock) {
            versions.extend(first_line(Command::new("python3").arg("--version")));
        }
        Self {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: field("/proc/meminfo", "MemTotal").unwrap_or_default(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            sync_ms: sync().ok(),
            versions,
        }
    }

    /// Adds the version of a running mongod.
    pub(crate) async fn note_mongod(&mut self, uri: &str) -> Result<()> {
        if self.versions.iter().any(|version| version.starts_with("mongod ")) {
            return Ok(());
        }
        let client = mongodb::Client::with_uri_str(uri).await?;
        let answer = client.database("admin").run_command(doc! { "buildInfo": 1 }).await?;
        self.versions
            .push(format!("mongod {}", answer.get_str("version").unwrap_or("of an unknown version")));
        Ok(())
    }

    pub(crate) fn sentence(&self) -> String {
        let sync = self
            .sync_ms
            .map(|time| format!("; 4 KiB written and synced in {time:.2} ms"))
            .unwrap_or_default();
        format!(
            "{}, {} cores, {}, Linux {}{sync}. {}.",
            self.cpu,
            self.cores,
            self.memory,
            self.kernel,
            self.versions.join(", ")
        )
    }
}

/// Returns the first line of a program's output.
fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}

fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Measures how long writing and syncing 4 KiB takes, in milliseconds.
fn sync() -> Result<f64> {
    let path = beside(&format!("sync-{}", std::process::id()))?;
    let timed = File::create(&path).map_err(anyhow::Error::from).and_then(timed);
    let _ = fs::remove_file(&path);
    timed
}

/// Writes and syncs the file several times, and returns the median time.
fn timed(mut file: File) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..51 {
        let start = Instant::now();
        file.rewind()?;
        file.write_all(&[7; 4096])?;
        file.sync_data()?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
