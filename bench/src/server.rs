//! Those under load, each in a process of its own. They and their data end with this program, whatever ends it.

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
/// Between two looks at one that is to become usable.
const LOOK: Duration = Duration::from_millis(20);

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    kind: &'static str,
    /// Where it listens.
    address: String,
    guardian: Guardian,
    folder: PathBuf,
}

/// How a daemon is started.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Daemon<'a> {
    /// The program, else the one beside this.
    pub(crate) program: Option<&'a Path>,
    /// The MongoDB, else the embedded store.
    pub(crate) mongodb: Option<&'a str>,
    pub(crate) options: &'a [&'a str],
}

impl Daemon<'_> {
    /// The program to run.
    ///
    /// # Errors
    /// If there is none.
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
            // No setting of the caller's shell counts.
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
            if let Some(address) = server.says("grpc=") {
                server.address = format!("http://{address}");
                return Ok(server);
            }
            server.look(give_up).await?;
        }
    }

    /// Starts so many nodes of etcd, as it comes; the leader is the first of them.
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
                    Err(_) => server.look(give_up).await?,
                }
            }
        }
        servers.swap(0, leader.context("etcd has no leader")?);
        Ok(servers)
    }

    /// Starts Redis with each write synced, and nothing else written.
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
            server.look(give_up).await?;
        }
        Ok(server)
    }

    fn launch(kind: &'static str, address: String, command: impl FnOnce(&Path) -> Command) -> Result<Self> {
        let folder = new_folder()?;
        let mut guardian = Guardian::new(&folder, &command(&folder))?;
        guardian.start()?;
        Ok(Self { kind, address, guardian, folder })
    }

    /// Lets some time pass in which the server may become usable.
    async fn look(&mut self, give_up: Instant) -> Result<()> {
        if !self.guardian.is_running()? || Instant::now() > give_up {
            let output = self.output();
            let last = output.trim().lines().last().unwrap_or("it said nothing").to_owned();
            bail!("{} does not become usable: {last}", self.kind);
        }
        sleep(LOOK).await;
        Ok(())
    }

    fn output(&self) -> String {
        fs::read_to_string(self.folder.join("output")).unwrap_or_default()
    }

    /// What a daemon said behind `name` when it was ready.
    fn says(&self, name: &str) -> Option<String> {
        let output = self.output();
        // Whole lines only: the rest may be under way.
        let (whole, _) = output.rsplit_once('\n')?;
        let ready = whole.lines().find(|line| line.starts_with("leased ready"))?;
        ready.split_whitespace().find_map(|word| word.strip_prefix(name)).map(ToOwned::to_owned)
    }

    /// Waits until a daemon hears of what others do.
    pub(crate) async fn follows(&mut self) -> Result<()> {
        let http = self.says("http=").context("the daemon has no side port")?;
        let give_up = Instant::now() + PATIENCE;
        while !readiness(&http).await?.contains("change feed") {
            self.look(give_up).await?;
        }
        Ok(())
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Its kind and its process.
    pub(crate) fn process(&self) -> Option<(&'static str, u32)> {
        Some((self.kind, self.guardian.pid()?))
    }
}

/// What a daemon says of itself.
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

/// A place beside this program, so on the disk that builds are on and not in memory.
pub(crate) fn beside(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// An empty folder.
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
