//! The daemon's process: telemetry, configuration, store, ports, run, exit code.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use leased::config::{Args, Config, Place};
use leased::server::{Listeners, run};
use leased::store::embedded::EmbeddedStore;
use leased::store::mongo::MongoStore;
use leased::store::{StartError, Store};
use leased::telemetry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Between tries to reach the store at start.
const RETRY: Duration = Duration::from_secs(1);
/// How long a try to reach the store may go on after the daemon was told to stop.
const LAST_TRY: Duration = Duration::from_secs(5);

/// How the process ends other than well.
enum Failure {
    /// Wrong usage or configuration: trying again as it is does not help.
    Usage(String),
    /// Something failed.
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

#[tokio::main]
async fn main() -> ExitCode {
    let (message, code) = match daemon().await {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => (message, 2),
        Err(Failure::Running(message)) => (message, 1),
    };
    eprintln!("leased: {message}");
    ExitCode::from(code)
}

async fn daemon() -> Result<(), Failure> {
    let config = Config::try_from(Args::parse()).map_err(Failure::usage)?;
    telemetry::init(config.log_format, &config.log_level).map_err(Failure::usage)?;
    let shutdown = on_signal().map_err(Failure::running)?;
    match &config.place {
        Place::Folder(folder) => {
            let open = async || Ok(EmbeddedStore::open(folder, config.rules).await?);
            serve(&config, shutdown, open).await
        }
        Place::MongoDb(location) => {
            let connect = async || Ok(MongoStore::connect(location, config.rules).await?);
            serve(&config, shutdown, connect).await
        }
    }
}

/// Serves the store that `start` gives, until told to stop.
async fn serve<S: Store>(
    config: &Config,
    shutdown: CancellationToken,
    start: impl AsyncFn() -> Result<S, StartError>,
) -> Result<(), Failure> {
    let Some(store) = reach(config, &shutdown, start).await? else { return Ok(()) };
    let listeners = match Listeners::bind(config).await {
        Ok(listeners) => listeners,
        Err(error) => {
            store.leave().await;
            return Err(Failure::usage(error));
        }
    };
    announce(&listeners, &store).map_err(Failure::running)?;
    run(listeners, store, config, shutdown).await.map_err(|error| match error.downcast_ref() {
        Some(StartError::Unusable(why)) => Failure::usage(why),
        _ => Failure::running(error),
    })
}

/// Starts the store and joins its other daemons, trying again while it cannot be reached; `None` if told to stop.
async fn reach<S: Store>(
    config: &Config,
    shutdown: &CancellationToken,
    start: impl AsyncFn() -> Result<S, StartError>,
) -> Result<Option<S>, Failure> {
    let give_up = config.store_timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let started = tokio::select! {
            started = start() => started,
            () = too_late(shutdown) => return Ok(None),
        };
        let cause = match joined(started).await {
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

/// Returns a while after the daemon was told to stop: a try that is under way mostly ends by itself until then, and
/// what it began with it.
async fn too_late(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    sleep(LAST_TRY).await;
}

/// Not to be dropped part-way: whoever has joined has to leave.
async fn joined<S: Store>(started: Result<S, StartError>) -> Result<S, StartError> {
    let store = started?;
    if let Err(error) = store.join().await {
        store.leave().await;
        return Err(error);
    }
    Ok(store)
}

/// The line that says that calls are accepted.
fn announce(listeners: &Listeners, store: &impl Store) -> std::io::Result<()> {
    let http = listeners.http()?.map_or_else(|| "off".to_owned(), |address| address.to_string());
    let (grpc, kind, id) = (listeners.grpc()?, store.name(), store.id());
    println!("leased ready grpc={grpc} http={http} store={kind} id={id}");
    Ok(())
}

/// Cancelled by the first SIGTERM or SIGINT; a second one ends the process at once.
fn on_signal() -> std::io::Result<CancellationToken> {
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let drain = shutdown.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if drain.is_cancelled() {
                eprintln!("leased: ended by a second signal");
                std::process::exit(1);
            }
            drain.cancel();
        }
    });
    Ok(shutdown)
}
