//! One `mongod`, as a replica set of its own or as the standalone server that it would be without.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mongodb::bson::{Document, doc};
use mongodb::options::ClientOptions;
use mongodb::{Client, Database};
use rustix::process::Signal;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::guardian::Guarded;
use crate::locate::{mongod, target};

const SET: &str = "rs0";
/// How long a server may take to become usable on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a starting server.
const LOOK: Duration = Duration::from_millis(25);
/// Tries when another process takes the chosen port first.
const TRIES: usize = 5;

/// A running server. Dropping it ends it and removes its data.
#[derive(Debug)]
pub struct Mongod {
    process: Option<Guarded>,
    kind: Kind,
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

    /// The server's process, while there is one.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Guarded::pid)
    }

    /// Stops the process without ending it: connections stay open and nothing answers.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets a paused process go on.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Ends the process as a crash would, and keeps the data for [`Self::restart`].
    ///
    /// # Errors
    /// If the data cannot be kept.
    pub fn kill(&mut self) -> Result<()> {
        fs::write(self.folder.join("keep"), "")?;
        self.process = None;
        Ok(())
    }

    /// Starts again on the same port and data, and returns when the server takes writes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn restart(&mut self) -> Result<()> {
        let keep = self.folder.join("keep");
        if keep.exists() {
            fs::remove_file(keep)?;
        }
        self.process = Some(run(&self.folder, self.port, self.kind)?);
        self.ready().await
    }

    async fn launch(kind: Kind) -> Result<Self> {
        let mut last = None;
        for _ in 0..TRIES {
            let port = free_port()?;
            let folder = new_folder()?;
            let set = if kind == Kind::ReplicaSet { format!("?replicaSet={SET}") } else { String::new() };
            let uri = format!("mongodb://127.0.0.1:{port}/{set}");
            let process = Some(run(&folder, port, kind)?);
            let server = Self { process, kind, port, folder, uri };
            match server.ready().await {
                Ok(()) => return Ok(server),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("mongod was not tried")))
    }

    /// Waits until the server takes writes; makes it a replica set first if it is to be one and is not yet.
    async fn ready(&self) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        let admin = self.admin().await?;
        let hello = loop {
            let hello = admin.run_command(doc! { "hello": 1 }).await;
            match hello {
                Ok(hello) => break hello,
                Err(error) if Instant::now() >= give_up || self.has_ended() => {
                    bail!("mongod did not start: {error}\n{}", self.log());
                }
                Err(_) => sleep(LOOK).await,
            }
        };
        if self.kind == Kind::ReplicaSet && !hello.contains_key("setName") {
            self.initiate(&admin).await?;
        }
        while !is_primary(&admin.run_command(doc! { "hello": 1 }).await.unwrap_or_default()) {
            if Instant::now() >= give_up {
                bail!("mongod did not become a primary\n{}", self.log());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    async fn initiate(&self, admin: &Database) -> Result<()> {
        let member = doc! { "_id": 0, "host": format!("127.0.0.1:{}", self.port) };
        let initiate = doc! { "replSetInitiate": { "_id": SET, "members": [member] } };
        match admin.run_command(initiate).await {
            Ok(_) => Ok(()),
            // A restarted server may know its set only a moment later.
            Err(error) if error.to_string().contains("AlreadyInitialized") => Ok(()),
            Err(error) => Err(error).context("cannot make mongod a replica set"),
        }
    }

    async fn admin(&self) -> Result<Database> {
        let mut options = ClientOptions::parse(format!("mongodb://127.0.0.1:{}/", self.port)).await?;
        options.direct_connection = Some(true);
        options.server_selection_timeout = Some(Duration::from_millis(500));
        options.heartbeat_freq = Some(Duration::from_millis(500));
        Ok(Client::with_options(options)?.database("admin"))
    }

    fn has_ended(&self) -> bool {
        self.log().contains("\"exitCode\"")
    }

    /// The last lines that the server wrote.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.join("output")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("the server has been killed")?.signal(signal)
    }
}

impl Drop for Mongod {
    fn drop(&mut self) {
        if self.process.take().is_none() {
            // Killed and not restarted: its data was kept for nothing.
            drop(fs::remove_dir_all(&self.folder));
        }
    }
}

fn is_primary(hello: &Document) -> bool {
    hello.get_bool("isWritablePrimary").unwrap_or(false)
}

fn run(folder: &Path, port: u16, kind: Kind) -> Result<Guarded> {
    let mut command = Command::new(mongod()?);
    command.arg("--dbpath").arg(folder.join("data"));
    command.args(["--port", &port.to_string(), "--bind_ip", "127.0.0.1", "--nounixsocket"]);
    command.args(["--wiredTigerCacheSizeGB", "0.25", "--setParameter", "enableTestCommands=1"]);
    command.args(["--setParameter", "diagnosticDataCollectionEnabled=false", "--oplogSize", "256"]);
    if kind == Kind::ReplicaSet {
        command.args(["--replSet", SET]);
    }
    Guarded::start(folder, &mut command)
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn new_folder() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = target().join("mongod").join(format!("data-{}-{number}", std::process::id()));
    fs::create_dir_all(folder.join("data"))?;
    Ok(folder.canonicalize()?)
}

/// The URI of a server that all of this process shares and that ends with it, or of the one that
/// `LEASED_TEST_MONGODB_URI` names.
///
/// # Errors
/// As [`Mongod::start`]; the first caller's failure is everyone's.
pub async fn shared() -> Result<&'static str> {
    static SHARED: OnceLock<Result<String, String>> = OnceLock::new();
    let (sender, receiver) = oneshot::channel();
    // A thread of its own: whoever comes first may belong to a runtime that ends long before the others do.
    thread::spawn(move || sender.send(SHARED.get_or_init(start_shared)));
    match receiver.await? {
        Ok(uri) => Ok(uri),
        Err(error) => bail!("{error}"),
    }
}

fn start_shared() -> Result<String, String> {
    if let Ok(uri) = std::env::var("LEASED_TEST_MONGODB_URI") {
        return Ok(uri);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let start = runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(Mongod::start()));
    let mongod = start.map_err(|error| format!("{error:#}"))?;
    let uri = mongod.uri().to_owned();
    // Never dropped: its guardian ends it together with this process.
    std::mem::forget(mongod);
    Ok(uri)
}
