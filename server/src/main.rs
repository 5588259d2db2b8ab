//! The process of the daemon: configuration, log, runtime, store, ports, signals and exit code.

use std::fmt::Display;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::sync::{Arc, RwLock, mpsc};
use std::time::Duration;

use leased::config::{Args, Config, StoreLocation};
use leased::server::{Listeners, run};
use leased::store::embedded::EmbeddedStore;
use leased::store::mongo::MongoStore;
use leased::store::{StartError, Store};
use leased::{panics, telemetry};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tokio::runtime::{self, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The pause between attempts to reach the store at start.
const RETRY: Duration = Duration::from_secs(1);
/// How long an attempt to reach the store may continue after the signal to stop.
const LAST_ATTEMPT: Duration = Duration::from_secs(5);

/// How many threads run blocking work, such as DNS look-ups and the write to standard output.
const BLOCKING_THREADS: usize = 16;
/// How long a thread may take to start.
const THREAD_START: Duration = Duration::from_secs(10);
/// How long blocking work may continue at the end of the process.
const LAST_BLOCKING_WORK: Duration = Duration::from_secs(1);
/// How many file descriptors the daemon needs beside those of gRPC connections: for the store, the
/// side port and the process itself.
const OTHER_FILES: u64 = 256;

/// Why the process ends with an error.
enum Failure {
    /// Wrong usage or configuration. The same start would fail again.
    Usage(String),
    /// Any other failure. The next start may succeed.
    Running(String),
}

impl Failure {
    fn usage(cause: impl Display) -> Self {
        Self::Usage(format!("{cause:#}"))
    }

    fn running(cause: impl Display) -> Self {
        Self::Running(format!("{cause:#}"))
    }
}

fn main() -> ExitCode {
    // Leases survive a restart, so a panic that is not contained ends the process.
    panics::install_hook();
    let code = match process() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            telemetry::say(&message);
            ExitCode::from(2)
        }
        Err(Failure::Running(message)) => {
            telemetry::say(&message);
            ExitCode::from(1)
        }
    };
    telemetry::flush();
    code
}

fn process() -> Result<(), Failure> {
    let config = Config::try_from(Args::read()).map_err(Failure::usage)?;
    telemetry::init(config.log_format, &config.log_level).map_err(Failure::usage)?;
    let runtime = runtime().map_err(Failure::running)?;
    start_threads(&runtime)?;
    let ended = runtime.block_on(daemon(&config));
    panics::note_daemon_ended();
    // Limited, because a DNS look-up that hangs cannot be cancelled.
    runtime.shutdown_timeout(LAST_BLOCKING_WORK);
    ended
}

/// Returns a runtime whose threads live as long as the process.
fn runtime() -> std::io::Result<Runtime> {
    runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::MAX)
        .build()
}

/// Starts all threads for blocking work.
///
/// tokio would start them when they are needed, and panics if the system refuses a thread.
fn start_threads(runtime: &Runtime) -> Result<(), Failure> {
    let (here, started) = mpsc::channel();
    let gate = Arc::new(RwLock::new(()));
    let _closed = gate.write();
    for _ in 0..BLOCKING_THREADS {
        let (here, gate) = (here.clone(), Arc::clone(&gate));
        // The gate keeps every task running until all have begun. Otherwise one thread could run
        // two of the tasks.
        runtime.spawn_blocking(move || {
            let _ = here.send(());
            drop(gate.read());
        });
    }
    for count in 0..BLOCKING_THREADS {
        started.recv_timeout(THREAD_START).map_err(|_| {
            Failure::Running(format!(
                "only {count} of {BLOCKING_THREADS} threads could be started: raise the limit on processes (ulimit -u, \
                 TasksMax, pids.max)"
            ))
        })?;
    }
    Ok(())
}

async fn daemon(config: &Config) -> Result<(), Failure> {
    let shutdown = on_signals().map_err(Failure::running)?;
    raise_file_limit(config.limits.connections);
    match &config.location {
        StoreLocation::Folder(folder) => {
            let open = async || Ok(EmbeddedStore::open(folder, config.rules).await?);
            serve(config, shutdown, open).await
        }
        StoreLocation::MongoDb(location) => {
            let connect = async || Ok(MongoStore::connect(location, config.rules).await?);
            serve(config, shutdown, connect).await
        }
    }
}

/// Raises the limit on open files as far as the system allows, and warns if that is too few for
/// `connections`.
fn raise_file_limit(connections: usize) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "could not raise the limit on open files");
    }
    let needed = u64::try_from(connections).unwrap_or(u64::MAX).saturating_add(OTHER_FILES);
    if let Some(open_files) = getrlimit(Resource::Nofile).current
        && open_files < needed
    {
        tracing::warn!(
            open_files,
            needed,
            "--max-connections {connections} cannot be reached: raise the limit on open files (ulimit -n, LimitNOFILE)"
        );
    }
}

/// Starts a store with `start`, and serves it until `shutdown` is cancelled.
async fn serve<S: Store>(
    config: &Config,
    shutdown: CancellationToken,
    start: impl AsyncFn() -> Result<S, StartError>,
) -> Result<(), Failure> {
    let Some(store) = start_store(config, &shutdown, start).await? else { return Ok(()) };
    let listeners = match Listeners::bind(config).await {
        Ok(listeners) => listeners,
        Err(error) => {
            // The daemon has joined the others, and they would count it as alive until its
            // heartbeat is old.
            store.leave().await;
            return Err(Failure::usage(error));
        }
    };
    print_ready_line(&listeners, &store).map_err(Failure::running)?;
    run(listeners, store, config, shutdown).await.map_err(|error| match error.downcast_ref() {
        Some(StartError::Unusable(why)) => Failure::usage(why),
        _ => Failure::running(error),
    })
}

/// Starts the store and joins its other daemons. Repeats both while the store cannot be reached.
/// Returns `None` if `shutdown` is cancelled first.
async fn start_store<S: Store>(
    config: &Config,
    shutdown: &CancellationToken,
    start: impl AsyncFn() -> Result<S, StartError>,
) -> Result<Option<S>, Failure> {
    let give_up = config.store_timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let started = tokio::select! {
            started = start() => started,
            () = last_attempt_is_over(shutdown) => return Ok(None),
        };
        let cause = match join(started).await {
            Ok(store) => return Ok(Some(store)),
            Err(_) if shutdown.is_cancelled() => return Ok(None),
            Err(error @ StartError::Unusable(_)) => return Err(Failure::usage(error)),
            Err(error) => error,
        };
        if give_up.is_some_and(|give_up| Instant::now() >= give_up) {
            return Err(Failure::running(format!("the store cannot be reached: {cause}")));
        }
        tracing::warn!(%cause, "the store cannot be reached yet; trying again");
        if shutdown.run_until_cancelled(sleep(RETRY)).await.is_none() {
            return Ok(None);
        }
    }
}

/// Completes when [`LAST_ATTEMPT`] has passed since `shutdown` was cancelled. An attempt under way usually completes
/// within that time, and then leaves nothing half done.
async fn last_attempt_is_over(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    sleep(LAST_ATTEMPT).await;
}

/// Joins the other daemons of a store that has started. Must not be dropped before it completes:
/// a daemon that has joined must leave.
async fn join<S: Store>(started: Result<S, StartError>) -> Result<S, StartError> {
    let store = started?;
    if let Err(error) = store.join().await {
        store.leave().await;
        return Err(error);
    }
    Ok(store)
}

/// Prints the line that says that the daemon accepts calls.
fn print_ready_line(listeners: &Listeners, store: &impl Store) -> std::io::Result<()> {
    let http = listeners.http()?.map_or_else(|| "off".to_owned(), |address| address.to_string());
    let (grpc, kind, id) = (listeners.grpc()?, store.name(), store.id());
    let line = format!("leased ready grpc={grpc} http={http} store={kind} id={id}\n");
    // On a thread for blocking work, and errors are ignored, because standard output may be a full
    // or closed pipe.
    tokio::task::spawn_blocking(move || {
        let _ = stdout().write_all(line.as_bytes()).and_then(|()| stdout().flush());
    });
    Ok(())
}

/// Handles every signal that would otherwise end the process, except for signals that report a
/// defect, such as SIGSEGV. Returns a token that the first SIGTERM, SIGINT or SIGQUIT cancels. A
/// second one ends the process at once.
fn on_signals() -> std::io::Result<CancellationToken> {
    // The streams of these signals are dropped at once, because a handler stays once it is
    // installed. With a handler for SIGXFSZ, a write that is too large fails like one on a full
    // disk.
    let meaningless = [Signal::ALARM, Signal::VTALARM, Signal::PROF, Signal::XCPU, Signal::XFSZ];
    for kind in [SignalKind::user_defined1(), SignalKind::user_defined2(), SignalKind::io()]
        .into_iter()
        .chain(meaningless.map(|signal| SignalKind::from_raw(signal.as_raw())))
    {
        let _ = signal(kind)?;
    }
    let mut hangup = signal(SignalKind::hangup())?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut quit = signal(SignalKind::quit())?;
    let shutdown = CancellationToken::new();
    let drain = shutdown.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = quit.recv() => {}
                _ = hangup.recv() => {
                    tracing::info!("SIGHUP does nothing: the configuration is read at the start only");
                    continue;
                }
            }
            if drain.is_cancelled() {
                telemetry::say("ended by a second signal");
                telemetry::flush();
                std::process::exit(1);
            }
            drain.cancel();
        }
    });
    Ok(shutdown)
}
