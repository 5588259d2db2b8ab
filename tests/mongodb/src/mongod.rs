//! One `mongod`, as a replica set of its own or as the standalone server that it would be without.

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
use tokio::time::{Instant, sleep};

use crate::guardian::Guardian;
use crate::locate;

const SET: &str = "rs0";
/// How long a server may take to become usable on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a starting server.
const LOOK: Duration = Duration::from_millis(20);

/// A running server. Dropping it ends it and removes its data.
#[derive(Debug)]
pub struct Mongod {
    guardian: Guardian,
    port: u16,
    folder: PathBuf,
    uri: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ReplicaSet,
    Standalone,
}

impl Mongod {
    /// Starts a replica set of one node on a free port of this host, and returns when it takes writes.
    ///
    /// # Errors
    /// A sentence about what is missing, or the end of the server's log.
    pub async fn start() -> Result<Self> {
        Self::launch(Kind::ReplicaSet).await
    }

    /// Starts a server without a replica set.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn standalone() -> Result<Self> {
        Self::launch(Kind::Standalone).await
    }

    /// The connection string.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The port on 127.0.0.1, the same for all of its life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's process, while there is one.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.guardian.pid()
    }

    /// Stops the process without ending it: connections stay open and nothing answers.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn pause(&self) -> Result<()> {
        self.guardian.signal(Signal::STOP)
    }

    /// Lets a paused process go on.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn resume(&self) -> Result<()> {
        self.guardian.signal(Signal::CONT)
    }

    /// Ends the process as a crash would, and keeps the data for [`Self::restart`].
    ///
    /// # Errors
    /// If somebody else ended the shell that watches over the server.
    pub fn kill(&mut self) -> Result<()> {
        self.guardian.end()
    }

    /// Starts again on the same port and data, and returns when the server takes writes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn restart(&mut self) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(admin) = self.begin(give_up).await? {
                return self.primary(&admin, give_up).await;
            }
            // The port may be the near end of somebody's connection, which is soon over.
            ensure!(Instant::now() < give_up, "port {} is taken by another process", self.port);
            sleep(LOOK).await;
        }
    }

    /// Ends the server, and returns when its data is gone.
    ///
    /// # Errors
    /// If the data could not be removed.
    pub async fn stop(self) -> Result<()> {
        let folder = self.folder.clone();
        // The end of a process is waited for, and a runtime's own thread must not wait.
        spawn_blocking(move || drop(self)).await?;
        ensure!(!folder.exists(), "{} is left behind: remove it", folder.display());
        Ok(())
    }

    async fn launch(kind: Kind) -> Result<Self> {
        let program = spawn_blocking(locate::mongod).await??;
        let give_up = Instant::now() + PATIENCE;
        loop {
            let mut server = Self::prepare(&program, kind, free_port()?)?;
            if let Some(admin) = server.begin(give_up).await? {
                if kind == Kind::ReplicaSet {
                    server.initiate(&admin).await?;
                }
                server.primary(&admin, give_up).await?;
                return Ok(server);
            }
            ensure!(Instant::now() < give_up, "every port that was free is taken a moment later");
        }
    }

    /// All but the process.
    fn prepare(program: &Path, kind: Kind, port: u16) -> Result<Self> {
        let set = if kind == Kind::ReplicaSet { format!("?replicaSet={SET}") } else { String::new() };
        let uri = format!("mongodb://127.0.0.1:{port}/{set}");
        let folder = new_folder()?;
        let guardian = Guardian::new(&folder, &command(program, &folder, kind, port)).inspect_err(|_| {
            // Nobody watches over the folder yet.
            drop(fs::remove_dir_all(&folder));
        })?;
        fs::create_dir(folder.join("data"))?;
        Ok(Self { guardian, port, folder, uri })
    }

    /// Starts the process and waits until it answers; `None` if another process has the port.
    async fn begin(&mut self, give_up: Instant) -> Result<Option<Database>> {
        self.guardian.start()?;
        loop {
            if !self.guardian.is_running()? {
                let log = self.log();
                ensure!(log.contains("Address already in use"), "mongod did not start:\n{}", tail(&log));
                return Ok(None);
            }
            // The driver looks twice a second at most, so it is not asked before somebody listens.
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.is_ok() {
                let admin = self.admin().await?;
                if self.answers(&admin).await {
                    return Ok(Some(admin));
                }
            }
            ensure!(Instant::now() < give_up, "mongod does not answer:\n{}", tail(&self.log()));
            sleep(LOOK).await;
        }
    }

    /// Whether the server at the port is this one. Another process may have taken the port first, and what listens
    /// there may be a MongoDB too.
    async fn answers(&self, admin: &Database) -> bool {
        let status = admin.run_command(doc! { "serverStatus": 1 }).await.unwrap_or_default();
        status.get_i64("pid").ok() == self.pid().map(i64::from)
    }

    async fn initiate(&self, admin: &Database) -> Result<()> {
        let member = doc! { "_id": 0, "host": format!("127.0.0.1:{}", self.port) };
        let initiate = doc! { "replSetInitiate": { "_id": SET, "members": [member] } };
        admin.run_command(initiate).await.context("cannot make mongod a replica set")?;
        Ok(())
    }

    /// Waits until the server takes writes.
    async fn primary(&self, admin: &Database, give_up: Instant) -> Result<()> {
        while !is_primary(&admin.run_command(doc! { "hello": 1 }).await.unwrap_or_default()) {
            ensure!(Instant::now() < give_up, "mongod did not become a primary:\n{}", tail(&self.log()));
            sleep(LOOK).await;
        }
        Ok(())
    }

    async fn admin(&self) -> Result<Database> {
        let mut options = ClientOptions::parse(format!("mongodb://127.0.0.1:{}/", self.port)).await?;
        options.direct_connection = Some(true);
        options.server_selection_timeout = Some(Duration::from_millis(500));
        options.heartbeat_freq = Some(Duration::from_millis(500));
        Ok(Client::with_options(options)?.database("admin"))
    }

    /// What the server wrote since it was last started.
    fn log(&self) -> String {
        let log = fs::read(self.folder.join("output")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }
}

fn is_primary(hello: &Document) -> bool {
    hello.get_bool("isWritablePrimary").unwrap_or(false)
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

fn command(program: &Path, folder: &Path, kind: Kind, port: u16) -> Command {
    let mut command = Command::new(program);
    command.arg("--dbpath").arg(folder.join("data"));
    command.args(["--port", &port.to_string(), "--bind_ip", "127.0.0.1", "--nounixsocket", "--quiet"]);
    command.args(["--wiredTigerCacheSizeGB", "0.25", "--setParameter", "enableTestCommands=1"]);
    command.args(["--setParameter", "diagnosticDataCollectionEnabled=false"]);
    if kind == Kind::ReplicaSet {
        command.args(["--replSet", SET, "--oplogSize", "256"]);
    }
    command
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A folder that did not exist: one of an earlier process with the same id may be left from a power cut.
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
    async fn a_port_that_another_mongod_has_is_seen_to_be_taken() {
        let other = Mongod::standalone().await.unwrap();
        let program = locate::mongod().unwrap();
        let mut late = Mongod::prepare(&program, Kind::ReplicaSet, other.port()).unwrap();
        assert!(late.begin(Instant::now() + PATIENCE).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_server_that_cannot_start_says_why() {
        let port = free_port().unwrap();
        let mut server = Mongod::prepare(Path::new("/dev/null"), Kind::Standalone, port).unwrap();
        let error = server.begin(Instant::now() + PATIENCE).await.unwrap_err().to_string();
        assert!(error.contains("/dev/null"), "{error}");
        let folder = server.folder.clone();
        drop(server);
        assert!(!folder.exists());
    }
}
