//! The servers under load, each in its own process. The processes and their data are removed when
//! this program ends, for whatever reason.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use throwaway_mongodb::Guardian;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::{etcd, redis_lock};

/// How long a server may take to become usable.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a server that is starting is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    kind: &'static str,
    /// The address that the server listens on.
    address: String,
    guardian: Guardian,
    folder: PathBuf,
}

/// How to start a daemon.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Daemon<'a> {
    /// The program to start; by default the one beside this program.
    pub(crate) program: Option<&'a Path>,
    /// The URI of a MongoDB; by default the daemon has the embedded store.
    pub(crate) mongodb: Option<&'a str>,
    pub(crate) options: &'a [&'a str],
}

impl Daemon<'_> {
    /// Returns the path of the program.
    ///
    /// # Errors
    /// If there is no such file.
    pub(crate) fn program(&self) -> Result<PathBuf> {
        let program = self.program.map_or_else(|| beside("leased"), |program| Ok(program.to_owned()))?;
        ensure!(program.is_file(), "there is no {}; build it with cargo build --release", program.display());
        Ok(program)
    }
}

impl Server {
    pub(crate) async fn leased(daemon: Daemon<'_>) -> Result<Self> {
        let program = daemon.program()?;
        let mut server = Self::launch("leased", String::new(), |folder| {
            // Settings in the caller's environment must not reach the daemon.
            let mut command = Command::new("env");
            command
                .args(["-u", "LEASED_MONGODB_URI", "-u", "LEASED_GRACE", "-u", "LEASED_DEFAULT_TTL"])
                .arg(program);
            command.args([
                "--listen=127.0.0.1:0",
                "--http-listen=127.0.0.1:0",
                "--log-level=warn",
                "--data-dir",
            ]);
            command.arg(folder.join("data")).args(daemon.options);
            if let Some(uri) = daemon.mongodb {
                command.args(["--mongodb-uri", uri, "--mongodb-database=leased-bench"]);
            }
            command
        })?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(address) = server.ready_field("grpc=") {
                server.address = format!("http://{address}");
                return Ok(server);
            }
            server.poll(give_up).await?;
        }
    }

    /// Starts a cluster of etcd nodes with default settings. The first of the returned servers is
    /// the leader.
    pub(crate) async fn etcd(nodes: usize) -> Result<Vec<Self>> {
        let free = |_| Ok((free_address("http")?, free_address("http")?));
        let addresses = (0..nodes).map(free).collect::<Result<Vec<_>>>()?;
        let named = addresses.iter().enumerate().map(|(node, (_, peer))| format!("node{node}={peer}"));
        let cluster = named.collect::<Vec<_>>().join(",");
        let mut servers = Vec::new();
        for (node, (client, peer)) in addresses.into_iter().enumerate() {
            servers.push(Self::launch("etcd", client.clone(), |folder| {
                let mut command = Command::new("etcd");
                command.args(["--name", &format!("node{node}"), "--data-dir"]).arg(folder.join("data"));
                command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
                command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
                command.args(["--initial-cluster", &cluster]);
                command
            })?);
        }
        let give_up = Instant::now() + PATIENCE;
        let mut leader = None;
        for (node, server) in servers.iter_mut().enumerate() {
            loop {
                match etcd::leads(&server.address).await {
                    Ok(leads) => {
                        leader = leader.or(leads.then_some(node));
                        break;
                    }
                    Err(_) => server.poll(give_up).await?,
                }
            }
        }
        servers.swap(0, leader.context("etcd has no leader")?);
        Ok(servers)
    }

    /// Starts Redis. It syncs each write, and writes no snapshots.
    pub(crate) async fn redis() -> Result<Self> {
        let address = free_address("redis")?;
        let port = address.rsplit(':').next().context("a port")?.to_owned();
        let mut server = Self::launch("redis", address, |folder| {
            let mut command = Command::new("redis-server");
            command.args(["--bind", "127.0.0.1", "--port", &port, "--dir"]).arg(folder);
            command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""]);
            command
        })?;
        let give_up = Instant::now() + PATIENCE;
        while !redis_lock::answers(&server.address).await {
            server.poll(give_up).await?;
        }
        Ok(server)
    }

    fn launch(kind: &'static str, address: String, command: impl FnOnce(&Path) -> Command) -> Result<Self> {
        let folder = new_folder()?;
        let mut guardian = Guardian::new(&folder, &command(&folder))?;
        guardian.start()?;
        Ok(Self { kind, address, guardian, folder })
    }

    /// Waits before the next check whether the server is usable. Fails if the server's process has
    /// ended, or after `give_up`.
    async fn poll(&mut self, give_up: Instant) -> Result<()> {
        if !self.guardian.is_running()? || Instant::now() > give_up {
            let output = self.output();
            let last = output.trim().lines().last().unwrap_or("it printed nothing").to_owned();
            bail!("{} does not become usable: {last}", self.kind);
        }
        sleep(POLL_INTERVAL).await;
        Ok(())
    }

    fn output(&self) -> String {
        fs::read_to_string(self.folder.join("output")).unwrap_or_default()
    }

    /// Returns the value of a field on the daemon's ready line, once that line has been printed.
    fn ready_field(&self, name: &str) -> Option<String> {
        let output = self.output();
        // Whole lines only: the last one may be incomplete.
        let (whole, _) = output.rsplit_once('\n')?;
        let ready = whole.lines().find(|line| line.starts_with("leased ready"))?;
        ready.split_whitespace().find_map(|word| word.strip_prefix(name)).map(ToOwned::to_owned)
    }

    /// Waits until a daemon follows the change feed.
    pub(crate) async fn until_following(&mut self) -> Result<()> {
        let http = self.ready_field("http=").context("the daemon has no HTTP port")?;
        let give_up = Instant::now() + PATIENCE;
        while !readiness(&http).await?.contains("change feed") {
            self.poll(give_up).await?;
        }
        Ok(())
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The kind and the id of the process.
    pub(crate) fn process(&self) -> Option<(&'static str, u32)> {
        Some((self.kind, self.guardian.pid()?))
    }
}

/// Returns a daemon's answer to `/readyz`.
async fn readiness(http: &str) -> Result<String> {
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

/// Returns a path beside this program. Builds are on a disk; the system's folder for temporary
/// files may be in memory.
pub(crate) fn beside(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// Makes an empty folder.
pub(crate) fn new_folder() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let folder = beside(&format!("bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))?;
    fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn free_address(scheme: &str) -> Result<String> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    Ok(format!("{scheme}://127.0.0.1:{port}"))
}
