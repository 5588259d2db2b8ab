//! A daemon that counts its allocations: this program, run again as a child process. The daemon
//! prints its counts for each line of its standard input, and ends when that input ends.

use std::io::{BufRead, BufReader, Write, stdin};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use clap::Parser;
use leased::config::{Args, Config};
use leased::server::{Listeners, run};
use leased::store::embedded::EmbeddedStore;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// The argument that makes this program run as the daemon.
pub(crate) const ROLE: &str = "--as-counting-daemon";
/// The environment variable that names a folder for heap profiles. Each daemon writes one file.
const PROFILE: &str = "LEASED_HEAP_PROFILE";

/// What a daemon has allocated so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heap {
    /// All allocations.
    pub(crate) blocks: u64,
    /// The bytes of all allocations.
    pub(crate) bytes: u64,
    /// The bytes that are still allocated.
    pub(crate) kept: u64,
}

/// A daemon with its own data folder. Dropping this value ends the daemon and removes the folder.
pub(crate) struct CountingDaemon {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    address: String,
    _folder: TempDir,
}

impl CountingDaemon {
    pub(crate) fn start(coalesces: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(ROLE).args(["--listen=127.0.0.1:0", "--http-listen=off", "--max-stream-rate=1000"]);
        command.arg(format!("--coalesce-touches={coalesces}")).arg("--data-dir").arg(folder.path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut daemon = Self { child, stdin, stdout, address: String::new(), _folder: folder };
        daemon.address = daemon.line();
        daemon
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn heap(&mut self) -> Heap {
        self.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let line = self.line();
        let mut figures = line.split(' ').map(|figure| figure.parse().unwrap());
        let mut next = || figures.next().unwrap();
        Heap { blocks: next(), bytes: next(), kept: next() }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the daemon has ended");
        line.trim_end().to_owned()
    }
}

impl Drop for CountingDaemon {
    fn drop(&mut self) {
        drop(self.stdin.take());
        drop(self.child.wait());
    }
}

/// Runs the daemon in the child process.
pub(crate) fn serve() {
    let profiler = dhat::Profiler::builder();
    let _profiler = match std::env::var_os(PROFILE) {
        Some(folder) => {
            let file = PathBuf::from(folder).join(format!("{}.json", std::process::id()));
            profiler.file_name(file).build()
        }
        None => profiler.testing().build(),
    };
    let options = std::env::args().filter(|argument| argument != ROLE);
    let config = Config::try_from(Args::parse_from(options)).unwrap();
    let shutdown = CancellationToken::new();
    let ended = shutdown.clone();
    std::thread::spawn(move || {
        for _ in stdin().lines().map_while(Result::ok) {
            let heap = dhat::HeapStats::get();
            println!("{} {} {}", heap.total_blocks, heap.total_bytes, heap.curr_bytes);
        }
        ended.cancel();
    });
    // The number of threads is fixed, since the counts must not depend on the machine.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let leased::config::StoreLocation::Folder(folder) = &config.location else {
            panic!("a folder was given")
        };
        let store = EmbeddedStore::open(folder, config.rules).await.unwrap();
        let listeners = Listeners::bind(&config).await.unwrap();
        println!("http://{}", listeners.grpc().unwrap());
        run(listeners, store, &config, shutdown).await.unwrap();
    });
}
