//! A simulated network with two daemons over one store, and the hosts that call them.

use std::time::Duration;

use clap::Parser;
use futures_util::stream;
use hyper_util::rt::TokioIo;
use leased::config::{Args, Config};
use leased::lease::Rules;
use leased::server;
use leased_client::{Builder, Client, run_on_timers_alone};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use turmoil::Sim;
use turmoil::net::{TcpListener, TcpStream};

use super::faults::{Fault, Faults};
use super::history::History;
use super::store::SimulatedStore;
use crate::support::ms;

pub(crate) const KEYS: [&str; 2] = ["jobs/a", "jobs/b"];
pub(crate) const DAEMONS: [&str; 2] = ["daemon-0", "daemon-1"];
/// The grace of the store.
pub(crate) const GRACE: Duration = ms(200);
/// The time after which a waiter's entry lapses if no daemon refreshes it.
pub(crate) const WAITER_TTL: Duration = Duration::from_secs(15);
/// The step of simulated time. The times of two hosts differ by less.
const TICK: Duration = ms(5);
const PORT: u16 = 5327;

/// One simulation.
pub(crate) struct World {
    pub(crate) history: History,
    pub(crate) store: SimulatedStore,
    /// Cancelled when all programs must end.
    pub(crate) over: CancellationToken,
    sim: Sim<'static>,
}

impl World {
    /// Starts two daemons. `seed` decides all randomness on this thread, except lease ids, the
    /// order of hash maps, and the order of tasks that are ready at the same time.
    pub(crate) fn new(seed: u64) -> Self {
        // Otherwise the client would count the real machine's suspended time.
        run_on_timers_alone();
        fastrand::seed(seed);
        let mut sim = turmoil::Builder::new()
            .rng_seed(seed)
            .tick_duration(TICK)
            .min_message_latency(ms(1))
            .max_message_latency(ms(fastrand::u64(2..=40)))
            .tcp_capacity(1024)
            .enable_random_order()
            .simulation_duration(Duration::from_secs(3600))
            .build();
        let history = History::default();
        let rules = Rules { grace: GRACE, waiter_ttl: WAITER_TTL };
        let has_feed = fastrand::u8(..4) > 0;
        let store = SimulatedStore::new(rules, has_feed, history.clone());
        for daemon in DAEMONS {
            let store = store.clone();
            sim.host(daemon, move || daemon_over(store.clone()));
        }
        Self { history, store, over: CancellationToken::new(), sim }
    }

    /// Adds a host that runs `program` each time it is started.
    pub(crate) fn host<F>(&mut self, name: &str, program: impl Fn() -> F + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        self.sim.host(name, move || {
            let program = program();
            async move {
                program.await;
                Ok(())
            }
        });
    }

    /// Returns how long the simulation has run.
    pub(crate) fn elapsed(&self) -> Duration {
        self.sim.elapsed()
    }

    /// Checks all rules so far.
    ///
    /// # Errors
    /// The rule that was broken, after a list of all events.
    pub(crate) fn check(&self) -> Result<(), String> {
        let history = &self.history;
        let overlap = history.overlap(&self.store).map(|overlap| format!("two believed at once: {overlap}"));
        let falling = history.falling_token().map(|holder| format!("a token does not rise: {holder}"));
        let stale = history.stale().map(|stale| format!("a stale write was accepted: {stale}"));
        match history.failure().or_else(|| self.store.violation()).or(overlap).or(falling).or(stale) {
            Some(violation) => Err(format!("{}\n{violation}", history.log())),
            None => Ok(()),
        }
    }

    /// Runs the simulation until `done` is true or the time `until` has come, and injects the
    /// faults that become due. Returns whether `done` is true.
    pub(crate) fn run(
        &mut self,
        until: Duration,
        mut faults: Faults,
        done: impl Fn(Duration) -> bool,
    ) -> bool {
        loop {
            for fault in faults.due(self.elapsed()) {
                self.history.note(self.elapsed(), format_args!("{fault:?}"));
                self.inject(&fault);
            }
            let is_done = done(self.elapsed());
            if is_done || self.elapsed() >= until {
                return is_done;
            }
            if let Err(error) = self.sim.step() {
                self.history.fail(self.elapsed(), format_args!("a program ended: {error}"));
                return false;
            }
        }
    }

    /// Begins or ends a fault now.
    pub(crate) fn inject(&mut self, fault: &Fault) {
        let sim = &mut self.sim;
        match fault {
            Fault::Store(fault) => self.store.set_fault(*fault),
            Fault::Partition(a, b) => sim.partition(a.as_str(), b.as_str()),
            Fault::OneWay(from, to) => sim.partition_oneway(from.as_str(), to.as_str()),
            Fault::Hold(a, b) => sim.hold(a.as_str(), b.as_str()),
            Fault::Lossy(a, b, rate) => sim.set_link_fail_rate(a.as_str(), b.as_str(), *rate),
            Fault::Repaired(a, b) => {
                sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.0);
                // Held messages arrive now.
                sim.release(a.as_str(), b.as_str());
            }
            Fault::Crash(host) => {
                self.history.end(|holder| holder == host, sim.elapsed());
                sim.crash(host.as_str());
            }
            Fault::Start(host) => sim.bounce(host.as_str()),
        }
    }
}

/// All beliefs end with the simulation.
impl Drop for World {
    fn drop(&mut self) {
        self.history.end(|_| true, self.elapsed());
    }
}

async fn daemon_over(store: SimulatedStore) -> turmoil::Result {
    let options = ["leased", "--drain-timeout=1s"];
    let config = Config::try_from(Args::try_parse_from(options)?)?;
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    let connections = stream::unfold(listener, async |listener| {
        let (stream, _) = listener.accept().await.ok()?;
        Some((stream, listener))
    });
    server::serve(connections, None, store, &config, CancellationToken::new()).await?;
    Ok(())
}

/// Returns a client of both daemons. It must be called on the host that uses the client.
pub(crate) fn client(name: &str) -> Client {
    let builder = Client::builder().owner(name);
    let builder = DAEMONS
        .into_iter()
        .fold(builder, |builder, daemon| builder.endpoint_with(daemon, move || channel(daemon)));
    builder.connect_lazily().unwrap()
}

/// Returns a channel to one daemon.
pub(crate) fn channel(daemon: &'static str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{daemon}:{PORT}")).unwrap();
    Builder::tuned(endpoint).connect_with_connector_lazy(tower::service_fn(move |_| async move {
        TcpStream::connect((daemon, PORT)).await.map(TokioIo::new)
    }))
}
