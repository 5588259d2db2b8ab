//! One `mongod` process with its port and its data. This module manages one member of a replica
//! set, and is independent of the others.

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mongodb::bson::{Document, doc};
use mongodb::options::ClientOptions;
use mongodb::{Client, Database};
use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::guardian::Guardian;
use crate::locate;

/// The name of every replica set here.
pub(crate) const SET: &str = "rs0";
/// How long a server may take to become usable on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The pause between two polls of a server whose state must change.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long a server may take to answer a command for which it needs no other server. A paused
/// server does not answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(2);

/// A server with its port and its folder, running or killed. Dropping this value ends the process
/// and removes its data.
#[derive(Debug)]
pub(crate) struct Node {
    guardian: Guardian,
    port: u16,
    folder: PathBuf,
    /// The server's `admin` database. `None` until the process answers, and after it is killed.
    admin: Option<Database>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Member,
    Standalone,
}

impl Node {
    /// Starts a server on a free port of this host, and returns when it answers. A member waits for
    /// [`Self::initiate`].
    pub(crate) async fn launch(kind: Kind) -> Result<Self> {
        Self::launch_with(kind, &[]).await
    }

    /// Starts a server with additional arguments for `mongod`. The server must still accept
    /// connections without TLS and without a password.
    pub(crate) async fn launch_with(kind: Kind, more: &[&str]) -> Result<Self> {
        let program = spawn_blocking(locate::mongod).await??;
        let give_up = Instant::now() + PATIENCE;
        loop {
            let mut node = Self::prepare(&program, kind, free_port()?, more)?;
            if node.begin(give_up).await? {
                return Ok(node);
            }
            ensure!(
                Instant::now() < give_up,
                "each free port was taken by another process before mongod could use it"
            );
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.guardian.pid()
    }

    pub(crate) fn pause(&self) -> Result<()> {
        self.guardian.signal(Signal::STOP)
    }

    pub(crate) fn resume(&self) -> Result<()> {
        self.guardian.signal(Signal::CONT)
    }

    /// Kills the process, and keeps the data.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.admin = None;
        self.guardian.kill()
    }

    /// Starts the server again with the same port and data, and returns when it answers.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        while !self.begin(give_up).await? {
            // An outgoing connection of another process may use the port for a short time.
            ensure!(Instant::now() < give_up, "port {} is taken by another process", self.port);
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Ends the process, and returns when its data is removed.
    pub(crate) async fn stop(self) -> Result<()> {
        let folder = self.folder.clone();
        // Dropping waits for the end of the process, which must not block a thread of the runtime.
        spawn_blocking(move || drop(self)).await?;
        ensure!(!folder.exists(), "{} is left behind: remove it", folder.display());
        Ok(())
    }

    /// Initiates a replica set of the members at `ports`. This server must be one of them.
    pub(crate) async fn initiate(&self, ports: &[u16], settings: Document) -> Result<()> {
        let member = |(id, port): (i32, &u16)| doc! { "_id": id, "host": format!("127.0.0.1:{port}") };
        let members: Vec<Document> = (0..).zip(ports).map(member).collect();
        let config = doc! { "_id": SET, "members": members, "settings": settings };
        let initiated = self.ask(doc! { "replSetInitiate": config }, PATIENCE).await;
        initiated.context("cannot make a replica set")?;
        Ok(())
    }

    /// Waits until the server's answer to `hello` fulfils `condition`. The error says that the
    /// server did not become `what`.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&Document) -> bool) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        while !condition(&self.hello().await) {
            ensure!(Instant::now() < give_up, "mongod did not become {what}:\n{}", tail(&self.log()));
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Returns the server's answer to `hello`, or an empty document if it does not answer.
    pub(crate) async fn hello(&self) -> Document {
        self.ask(doc! { "hello": 1 }, ANSWER).await.unwrap_or_default()
    }

    /// Runs a command on this server, whatever its role in the replica set.
    pub(crate) async fn ask(&self, command: Document, patience: Duration) -> Result<Document> {
        let admin = self.admin.clone().context("the server has been killed")?;
        // The command runs in a separate task, because the driver's futures must not be dropped
        // before they complete.
        let answer = tokio::spawn(async move { admin.run_command(command).await });
        Ok(timeout(patience, answer).await.context("the server does not answer")???)
    }

    /// Prepares the folder and the guardian, without starting the process.
    fn prepare(program: &Path, kind: Kind, port: u16, more: &[&str]) -> Result<Self> {
        let folder = new_folder()?;
        let mut command = command(program, &folder, kind, port);
        command.args(more);
        let guardian = Guardian::new(&folder, &command).inspect_err(|_| {
            // Without a guardian, nothing else removes the folder.
            drop(fs::remove_dir_all(&folder));
        })?;
        fs::create_dir(folder.join("data"))?;
        Ok(Self { guardian, port, folder, admin: None })
    }

    /// Starts the process and waits until it answers. Returns `false` if another process has the
    /// port.
    async fn begin(&mut self, give_up: Instant) -> Result<bool> {
        self.guardian.start()?;
        loop {
            if !self.guardian.is_running()? {
                let log = self.log();
                ensure!(log.contains("Address already in use"), "mongod did not start:\n{}", tail(&log));
                return Ok(false);
            }
            // The driver tries at most twice a second. A plain connection shows sooner that a
            // server listens.
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.is_ok() {
                self.admin = Some(admin(self.port).await?);
                if self.is_itself().await {
                    return Ok(true);
                }
            }
            ensure!(Instant::now() < give_up, "mongod does not answer:\n{}", tail(&self.log()));
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Returns whether the server at the port is this one. Another process may have bound the port
    /// first, and that process may be a MongoDB too.
    async fn is_itself(&self) -> bool {
        let status = self.ask(doc! { "serverStatus": 1 }, ANSWER).await.unwrap_or_default();
        status.get_i64("pid").ok() == self.pid().map(i64::from)
    }

    /// Returns what the server has printed since it was last started.
    fn log(&self) -> String {
        let log = fs::read(self.folder.join("output")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }
}

pub(crate) fn is_primary(hello: &Document) -> bool {
    hello.get_bool("isWritablePrimary").unwrap_or(false)
}

pub(crate) fn is_secondary(hello: &Document) -> bool {
    hello.get_bool("secondary").unwrap_or(false)
}

/// Returns the last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

async fn admin(port: u16) -> Result<Database> {
    let mut options = ClientOptions::parse(format!("mongodb://127.0.0.1:{port}/")).await?;
    options.direct_connection = Some(true);
    options.server_selection_timeout = Some(Duration::from_millis(500));
    options.heartbeat_freq = Some(Duration::from_millis(500));
    Ok(Client::with_options(options)?.database("admin"))
}

fn command(program: &Path, folder: &Path, kind: Kind, port: u16) -> Command {
    let mut command = Command::new(program);
    command.arg("--dbpath").arg(folder.join("data"));
    command.args(["--port", &port.to_string(), "--bind_ip", "127.0.0.1", "--nounixsocket", "--quiet"]);
    // Tests set fail points, which are test commands.
    command.args(["--wiredTigerCacheSizeGB", "0.25", "--setParameter", "enableTestCommands=1"]);
    command.args(["--setParameter", "diagnosticDataCollectionEnabled=false"]);
    if kind == Kind::Member {
        command.args(["--replSet", SET, "--oplogSize", "256"]);
        // By default, a member that replicates from a hanging member looks for another source only
        // after five seconds or more. Until then a new primary may have no majority.
        command.args(["--setParameter", "oplogNetworkTimeoutBufferSeconds=1"]);
        command.args(["--setParameter", "oplogFetcherSteadyStateMaxFetcherRestarts=0"]);
    }
    command
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Makes a folder that did not exist before. After a power cut, a folder of an earlier process with
/// the same process id may be left.
fn new_folder() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let parent = locate::target().join("mongod");
    fs::create_dir_all(&parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let parent = parent.canonicalize()?;
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("data-{}-{number}", std::process::id()));
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => {
                made.with_context(|| format!("cannot create {}", folder.display()))?;
                return Ok(folder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]

    use super::*;

    #[tokio::test]
    async fn a_port_that_another_mongod_has_bound_is_detected() {
        let other = Node::launch(Kind::Standalone).await.unwrap();
        let program = locate::mongod().unwrap();
        let mut late = Node::prepare(&program, Kind::Member, other.port(), &[]).unwrap();
        assert!(!late.begin(Instant::now() + PATIENCE).await.unwrap());
    }

    #[tokio::test]
    async fn a_server_that_cannot_start_says_why() {
        let port = free_port().unwrap();
        let mut server = Node::prepare(Path::new("/dev/null"), Kind::Standalone, port, &[]).unwrap();
        let error = server.begin(Instant::now() + PATIENCE).await.unwrap_err().to_string();
        assert!(error.contains("/dev/null"), "{error}");
        let folder = server.folder.clone();
        drop(server);
        assert!(!folder.exists());
    }
}
