//! Those under load, each in a process of its own, and what processes spend of the processors.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::etcd;

/// A process under load; it and its data end with this program.
#[derive(Debug)]
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    folder: PathBuf,
    /// Where a daemon says how it is.
    http: Option<String>,
}

impl Process {
    /// Starts `binary`, or the daemon beside this program, over the MongoDB at `uri` or with its embedded store.
    /// Returns where it listens.
    pub(crate) fn leased(binary: Option<&Path>, uri: Option<&str>) -> Result<(String, Self)> {
        let beside = || Ok::<_, anyhow::Error>(std::env::current_exe()?.with_file_name("leased"));
        let binary = binary.map_or_else(beside, |binary| Ok(binary.to_owned()))?;
        let folder = new_folder()?;
        let mut command = Command::new(&binary);
        command
            .args(["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", "--log-level=warn", "--data-dir"])
            .arg(&folder);
        command.env_remove("LEASED_MONGODB_URI").stdout(Stdio::piped());
        if let Some(uri) = uri {
            command.env("LEASED_MONGODB_URI", uri).arg("--mongodb-database=leased-bench");
        }
        let child = command.spawn().with_context(|| {
            format!("cannot run {}; build it with cargo build --release", binary.display())
        })?;
        let mut process = Self { name: "leased", child, folder, http: None };
        let mut ready = String::new();
        BufReader::new(process.child.stdout.take().context("the daemon's output")?).read_line(&mut ready)?;
        let named = |name| ready.split_whitespace().find_map(|word| word.strip_prefix(name));
        process.http = named("http=").map(ToOwned::to_owned);
        let address = named("grpc=");
        Ok((format!("http://{}", address.context("the daemon did not become ready")?), process))
    }

    /// Starts etcd with one node, as it comes.
    pub(crate) async fn etcd() -> Result<(String, Self)> {
        let [client, peer] = [free_address()?, free_address()?];
        let folder = new_folder()?;
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(folder.join("data")).args(["--listen-client-urls", &client]);
        command.args(["--advertise-client-urls", &client, "--listen-peer-urls", &peer]);
        command.args([
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &format!("default={peer}"),
        ]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().context("cannot run etcd; Debian's package is etcd-server")?;
        let process = Self { name: "etcd", child, folder, http: None };
        let start = Instant::now();
        while !etcd::answers(&client).await {
            ensure!(start.elapsed() < Duration::from_secs(30), "etcd does not answer");
            sleep(Duration::from_millis(50)).await;
        }
        Ok((client, process))
    }

    /// Waits until a daemon hears of what others do.
    pub(crate) async fn follows(&self) -> Result<()> {
        let http = self.http.as_deref().context("the daemon has no side port")?;
        let start = Instant::now();
        while !ready(http).await?.contains("change feed") {
            ensure!(start.elapsed() < Duration::from_secs(30), "the daemons do not hear of each other");
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.folder));
    }
}

/// What a daemon says of itself.
async fn ready(http: &str) -> Result<String> {
    let mut stream = TcpStream::connect(http).await?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: leased\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Whether a program is on the `PATH`.
pub(crate) fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// An empty folder beside this program, so on the disk that builds are on and not in memory.
fn new_folder() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = std::env::current_exe()?.with_file_name(name);
    fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn free_address() -> Result<String> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    Ok(format!("http://127.0.0.1:{port}"))
}

/// Processor time at an instant, by process; this program is one of them.
#[derive(Debug)]
pub(crate) struct Cpu(Vec<(&'static str, u32, Duration)>);

impl Cpu {
    pub(crate) fn now(processes: &[(&'static str, u32)]) -> Self {
        let known = processes.iter().copied().chain([("load", std::process::id())]);
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
