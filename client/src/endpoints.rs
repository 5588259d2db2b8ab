//! The daemons that a client may ask: which one is asked, when another, and when the first one again. Knows nothing of leases.
//!
//! An endpoint is what the user names. A host name with several addresses is as many daemons. Each client has an order of its own
//! among all daemons, by chance: it asks the first, turns to the next when that fails, and comes back to the first after some
//! minutes, so that the clients of a fleet are spread over all daemons again after any of them has been away.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, OnceCell, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};

use crate::builder::Builder;
use crate::daemon::{Daemon, Dial, IDLE, Purpose, Slot};
use crate::error::{Error, Failure, cause};
use crate::moment::{Moment, after};
use crate::names::look_up;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Looking up a name again because a daemon failed is done no sooner than this, and without a failure after `NAMES_LAST`.
const BETWEEN_LOOK_UPS: Duration = Duration::from_secs(1);
const NAMES_LAST: Duration = Duration::from_secs(300);
/// The least time between looks at daemons that are preferred to the one that is asked; the most is three times as long.
const RETURN: Duration = Duration::from_secs(60);
/// How long daemons have to say which store they serve before the first lease is asked for.
const COMPARING: Duration = Duration::from_secs(1);
/// How long a look at a daemon may take that nobody waits for.
const LOOKING: Duration = Duration::from_secs(5);
/// Where an answer says which store it comes from.
const STORE: &str = "leased-store";
/// Where a call says how often it has been sent before, as gRPC has it for its own retries.
pub(crate) const PREVIOUS_ATTEMPTS: &str = "grpc-previous-rpc-attempts";

/// What a user names.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) reach: Reach,
}

/// How it is reached.
#[derive(Clone)]
pub(crate) enum Reach {
    /// By a host name, which may have several addresses, and others later.
    Name { url: Uri, host: String, port: u16 },
    /// By connections of this kind.
    Dial(Dial),
}

/// An answer, and what it is counted from.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) body: T,
    /// Just before the request left.
    pub(crate) sent_at: Moment,
}

/// How a try failed that another one may follow.
#[derive(Debug, Default)]
struct Failed {
    /// What was wrong, unless nobody said anything in time.
    cause: Option<String>,
    /// What a daemon said, if one did.
    source: Option<Status>,
    /// The pause that it asked for.
    asked: Option<Duration>,
}

impl Failed {
    /// Of a try that `status` is the end of.
    fn at(failure: Failure, status: Status) -> Self {
        let (cause, asked) = match failure {
            Failure::Useless(error) | Failure::Final(error) => (error.to_string(), None),
            Failure::Passing(asked) => (cause(&status), asked),
        };
        Self { cause: Some(cause), source: Some(status), asked }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { cause: Some(error.to_string()), ..Self::default() }
    }
}

/// All daemons that a client may ask, of which one is preferred until it fails.
pub(crate) struct Endpoints {
    names: Vec<String>,
    resolving: Vec<Resolving>,
    state: Mutex<State>,
    /// How long a call may take beyond what it waits at the daemon.
    timeout: Duration,
    /// Another daemon is preferred than the one that the keepalive stream was opened at.
    pub(crate) returned: Notify,
    /// Counts failures, each of which may mean that a name has other addresses now.
    failures: watch::Sender<()>,
    /// Counts look-ups that have ended.
    look_ups: watch::Sender<()>,
    /// All daemons have been asked once which store they serve.
    compared: OnceCell<()>,
    /// Two of them serve different ones.
    is_mixed: AtomicBool,
}

/// A name that is looked up again and again.
struct Resolving {
    name: String,
    url: Uri,
    host: String,
    port: u16,
    found: Mutex<Vec<(SocketAddr, Arc<Daemon>)>>,
    /// Its first look-up has ended.
    is_looked_up: AtomicBool,
}

#[derive(Default)]
struct State {
    /// In the order in which they are asked.
    daemons: Vec<Arc<Daemon>>,
    preferred: usize,
    /// The store that leases are from, and a daemon that has said so.
    store: Option<(String, String)>,
    /// A name whose last look-up found nothing, and why.
    unknown_name: Option<(String, String)>,
}

impl Endpoints {
    /// `sources` must not be empty. [`tend`](Self::tend) must run beside it.
    pub(crate) fn new(sources: Vec<Source>, timeout: Duration) -> Self {
        let names = sources.iter().map(|source| source.name.clone()).collect();
        let (mut state, mut resolving) = (State::default(), Vec::new());
        for Source { name, reach } in sources {
            match reach {
                Reach::Dial(dial) => state.daemons.push(Arc::new(Daemon::new(name, 0, dial))),
                Reach::Name { url, host, port } => {
                    let (found, is_looked_up) = (Mutex::default(), AtomicBool::new(false));
                    resolving.push(Resolving { name, url, host, port, found, is_looked_up });
                }
            }
        }
        state.daemons.sort_by_key(|daemon| daemon.order);
        Self {
            names,
            resolving,
            state: Mutex::new(state),
            timeout,
            returned: Notify::new(),
            failures: watch::Sender::new(()),
            look_ups: watch::Sender::new(()),
            compared: OnceCell::new(),
            is_mixed: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// How many daemons there are to ask.
    pub(crate) fn len(&self) -> usize {
        self.state().daemons.len().max(1)
    }

    /// The daemon to ask, once the name of one has been looked up.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn pick(&self) -> Result<Arc<Daemon>, String> {
        let mut look_ups = self.look_ups.subscribe();
        if let Some(daemon) = self.state().pick() {
            return Ok(daemon);
        }
        if self.state().unknown_name.is_some() {
            // Look again; the last time may have been long ago.
            self.failures.send_replace(());
        }
        let _ = look_ups.changed().await;
        let found = self.state().pick();
        found.ok_or_else(|| self.silence())
    }

    /// Why nobody has said anything.
    fn silence(&self) -> String {
        let state = self.state();
        match &state.unknown_name {
            Some((host, error)) if state.daemons.is_empty() => format!("{host}: {error}"),
            _ => "it does not answer in time".to_owned(),
        }
    }

    /// Whether this is the daemon to ask.
    pub(crate) fn is_preferred(&self, daemon: &Arc<Daemon>) -> bool {
        self.state().pick().is_none_or(|preferred| Arc::ptr_eq(&preferred, daemon))
    }

    /// Asks another from now on, unless somebody has already turned away from this one.
    pub(crate) fn avoid(&self, daemon: &Arc<Daemon>) {
        let mut state = self.state();
        if let Some(position) = state.position(daemon)
            && state.pick().is_some_and(|preferred| Arc::ptr_eq(&preferred, daemon))
        {
            state.preferred = (position + 1) % state.daemons.len();
        }
        drop(state);
        self.failures.send_replace(());
    }

    /// Takes in what a failed try at `slot` means, and turns to another daemon unless it is an answer.
    pub(crate) fn fail(&self, slot: &Slot, status: &Status) -> Failure {
        let told = match status.metadata().contains_key(STORE) {
            true => self.meet(&slot.daemon, status.metadata()),
            // Nobody answered, or a daemon of an earlier version.
            false => Ok(()),
        };
        let failure = told.map_or_else(Failure::Useless, |()| Failure::of(status, &slot.daemon.name));
        self.turn_away(slot, &failure);
        failure
    }

    /// Turns to another daemon and another connection, unless this is an answer.
    pub(crate) fn turn_away(&self, slot: &Slot, failure: &Failure) {
        if let Failure::Final(_) = failure {
            return;
        }
        // It may be the connection; nobody knows. And whoever answers next may be another.
        slot.retire();
        slot.daemon.forget();
        if let Failure::Useless(error) = failure {
            tracing::warn!(endpoint = slot.daemon.name, %error, "an endpoint is of no use");
            // Only the daemon that is asked can be avoided, and one that is barred is not asked.
            self.avoid(&slot.daemon);
            slot.daemon.bar(error.clone());
        } else {
            slot.daemon.unbar();
            self.avoid(&slot.daemon);
        }
    }

    /// Sends `request` until someone answers or [`timeout`](Self::timeout) is over.
    ///
    /// # Errors
    /// The answer, if it is an error, or [`Error::Unavailable`].
    pub(crate) async fn call<R: Clone, T, F>(
        &self,
        purpose: Purpose,
        request: R,
        send: impl FnMut(Channel, Request<R>) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_waiting(purpose, Instant::now(), request, send).await
    }

    /// Sends a call that the daemon may answer as late as `until`.
    ///
    /// # Errors
    /// The answer, if it is an error, or [`Error::Unavailable`].
    pub(crate) async fn call_waiting<R: Clone, T, F>(
        &self,
        purpose: Purpose,
        until: Instant,
        request: R,
        mut send: impl FnMut(Channel, Request<R>) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let give_up = after(until, self.timeout);
        let mut pauses = Pauses::default();
        let mut attempts = 0;
        // What the call failed with last, unless the last try was cut short.
        let mut said: Option<(String, Option<Status>)> = None;
        loop {
            // A daemon that is silent leaves time for two others.
            let patience = self.timeout / u32::try_from(self.len().min(3)).unwrap_or(1);
            let late = after(Instant::now().max(until), patience).min(give_up);
            // Nobody waits in line at a daemon that is not asked yet.
            let soon = after(Instant::now(), patience).min(give_up);
            let failed = match self.prepared(purpose, soon).await {
                Ok(daemon) => {
                    let slot = daemon.slot(purpose);
                    let sent_at = Moment::now();
                    let sent = send(slot.channel.clone(), attempt(request.clone(), attempts));
                    attempts += 1;
                    match timeout_at(late, sent).await {
                        Ok(Ok(response)) => match self.meet_at(&slot, response.metadata()) {
                            Ok(()) => return Ok(Answer { body: response.into_inner(), sent_at }),
                            Err(error) => error.into(),
                        },
                        Ok(Err(status)) => match self.fail(&slot, &status) {
                            Failure::Final(error) => return Err(error),
                            failure => Failed::at(failure, status),
                        },
                        Err(_) => {
                            self.turn_away(&slot, &Failure::Passing(None));
                            Failed::default()
                        }
                    }
                }
                Err(failed) => failed,
            };
            tracing::debug!(cause = failed.cause, "a call failed");
            if let Some(cause) = failed.cause {
                said = Some((cause, failed.source));
            }
            if let Some(error) = self.useless() {
                return Err(error);
            }
            let pause = pauses.next(self.len(), failed.asked);
            if after(Instant::now(), pause) >= give_up {
                let (cause, source) = said.unwrap_or_else(|| (self.silence(), None));
                let cause = self.with_barred(cause);
                return Err(Error::Unavailable { endpoints: self.names.join(", "), cause, source });
            }
            sleep(pause).await;
        }
    }

    /// The daemon to ask, if it is known not to serve another store than the others. It has until `late` to say so.
    ///
    /// # Errors
    /// Why it is not asked.
    async fn prepared(&self, purpose: Purpose, late: Instant) -> Result<Arc<Daemon>, Failed> {
        let daemon = match timeout_at(late, self.pick()).await {
            Ok(Ok(daemon)) => daemon,
            Ok(Err(cause)) => return Err(Failed { cause: Some(cause), ..Failed::default() }),
            Err(_) => return Err(Failed::default()),
        };
        // Upkeep is about leases that another store does not have, and its answers tell whose they are.
        if purpose != Purpose::Upkeep && self.len() > 1 && !daemon.is_known() {
            self.look(&daemon, late).await?;
        }
        Ok(daemon)
    }

    /// Notes which store the daemon serves. Leases of one store are never asked for at another.
    ///
    /// # Errors
    /// [`Error::DifferentStores`] if another daemon of this client serves another one.
    pub(crate) fn meet(&self, daemon: &Arc<Daemon>, answer: &MetadataMap) -> Result<(), Error> {
        let told = answer.get(STORE).and_then(|store| store.to_str().ok());
        let is_news = daemon.tells(told);
        let Some(told) = told.filter(|_| is_news || self.is_mixed.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let mut state = self.state();
        let Some((store, other)) = state.store.clone().filter(|(store, _)| store != told) else {
            if state.store.is_none() {
                state.store = Some((told.to_owned(), daemon.name.clone()));
            }
            return Ok(());
        };
        let serves_it =
            |other: &&Arc<Daemon>| !Arc::ptr_eq(other, daemon) && other.store().as_ref() == Some(&store);
        match state.daemons.iter().find(serves_it) {
            Some(elsewhere) => {
                self.is_mixed.store(true, Ordering::Relaxed);
                Err(Error::DifferentStores {
                    endpoint: daemon.name.clone(),
                    store: told.to_owned(),
                    other: elsewhere.name.clone(),
                    other_store: store,
                })
            }
            // Nobody serves the other store any more: it has been replaced.
            None => {
                tracing::warn!(
                    daemon = daemon.name,
                    store = told,
                    before = store,
                    from = other,
                    "another store"
                );
                state.store = Some((told.to_owned(), daemon.name.clone()));
                Ok(())
            }
        }
    }

    /// Notes which store an answer at `slot` comes from, and turns to another daemon if it is another one.
    ///
    /// # Errors
    /// [`Error::DifferentStores`].
    pub(crate) fn meet_at(&self, slot: &Slot, answer: &MetadataMap) -> Result<(), Error> {
        self.meet(&slot.daemon, answer)
            .inspect_err(|error| self.turn_away(slot, &Failure::Useless(error.clone())))
    }

    /// Asks all daemons once which store they serve, as far as they answer soon.
    ///
    /// # Errors
    /// [`Error::DifferentStores`] if two of them serve different ones.
    pub(crate) async fn compare(&self) -> Result<(), Error> {
        let once = || async {
            let mut look_ups = self.look_ups.subscribe();
            let looked_up = look_ups
                .wait_for(|()| self.resolving.iter().all(|name| name.is_looked_up.load(Ordering::Relaxed)));
            let _ = timeout(COMPARING, looked_up).await;
            if self.len() > 1 {
                self.look_at_all(self.all_but(Daemon::is_known)).await;
            }
        };
        self.compared.get_or_init(once).await;
        if !self.is_mixed.load(Ordering::Relaxed) {
            return Ok(());
        }
        // The endpoint that was wrong may have been mended.
        self.look_at_all(self.all_but(|_| false)).await;
        let mixed = self.mixed();
        self.is_mixed.store(mixed.is_some(), Ordering::Relaxed);
        mixed.map_or(Ok(()), Err)
    }

    /// Whether a daemon that can be asked is one of ours.
    ///
    /// # Errors
    /// [`Error::NotLeased`], [`Error::DifferentStores`] or [`Error::Unavailable`].
    pub(crate) async fn check(&self) -> Result<(), Error> {
        self.call(Purpose::Upkeep, (), |channel, _| health(channel)).await?;
        self.compare().await
    }

    /// Asks daemons all at once which store they serve.
    async fn look_at_all(&self, daemons: Vec<Arc<Daemon>>) {
        let late = Instant::now() + COMPARING;
        join_all(daemons.iter().map(|daemon| self.look(daemon, late))).await;
    }

    /// Asks a daemon whether it serves, and notes what it says of itself. Turns to another one if it says nothing until `late`,
    /// or for too long.
    ///
    /// # Errors
    /// Why it is not to be asked.
    async fn look(&self, daemon: &Arc<Daemon>, late: Instant) -> Result<(), Failed> {
        let slot = daemon.slot(Purpose::Upkeep);
        let late = late.min(Instant::now() + LOOKING);
        match timeout_at(late, health(slot.channel.clone())).await {
            Ok(Ok(response)) => {
                self.meet_at(&slot, response.metadata())?;
                daemon.unbar();
                Ok(())
            }
            Ok(Err(status)) => {
                let failure = self.fail(&slot, &status);
                if let Failure::Final(_) = failure {
                    // It is no answer to what was to be asked.
                    self.turn_away(&slot, &Failure::Passing(None));
                }
                Err(Failed::at(failure, status))
            }
            Err(_) => {
                self.turn_away(&slot, &Failure::Passing(None));
                Err(Failed::default())
            }
        }
    }

    /// All daemons but these.
    fn all_but(&self, these: impl Fn(&Daemon) -> bool) -> Vec<Arc<Daemon>> {
        self.state().daemons.iter().filter(|daemon| !these(daemon)).cloned().collect()
    }

    /// What is wrong with the daemon to ask, if no daemon is of any use.
    pub(crate) fn useless(&self) -> Option<Error> {
        let daemon = self.state().pick()?;
        daemon.barred()
    }

    /// The cause of a failure, and why other daemons were not even asked.
    fn with_barred(&self, cause: String) -> String {
        let state = self.state();
        let barred = state.daemons.iter().filter_map(|daemon| daemon.barred()).map(|error| error.to_string());
        std::iter::once(cause).chain(barred).collect::<Vec<_>>().join("; ")
    }

    /// The first daemon that serves another store than the rest.
    fn mixed(&self) -> Option<Error> {
        let state = self.state();
        let (store, other) = state.store.clone()?;
        let different = |daemon: &Arc<Daemon>| daemon.store().filter(|told| *told != store);
        let (daemon, told) = state.daemons.iter().find_map(|daemon| Some((daemon, different(daemon)?)))?;
        Some(Error::DifferentStores { endpoint: daemon.name.clone(), store: told, other, other_store: store })
    }

    /// Looks up names, closes connections that nobody uses, and comes back to the daemon that is preferred, for as long as it is
    /// polled.
    pub(crate) async fn tend(&self) {
        let names = join_all(self.resolving.iter().map(|name| self.resolve(name)));
        tokio::join!(names, self.close_idle(), self.come_back());
    }

    async fn resolve(&self, name: &Resolving) {
        let mut failures = self.failures.subscribe();
        loop {
            failures.mark_unchanged();
            self.looked_up(name, look_up(name.host.clone(), name.port).await);
            let _ = timeout(NAMES_LAST, failures.changed()).await;
            sleep(BETWEEN_LOOK_UPS).await;
        }
    }

    /// Takes in what a look-up has found.
    fn looked_up(&self, name: &Resolving, found: io::Result<Vec<SocketAddr>>) {
        match found {
            Ok(addresses) => {
                self.found(name, addresses);
                self.state().unknown_name.take_if(|(host, _)| *host == name.host);
            }
            // The addresses from before are the best there is.
            Err(error) => {
                tracing::debug!(name = name.host, %error, "the name was not found");
                self.state().unknown_name = Some((name.host.clone(), error.to_string()));
            }
        }
        name.is_looked_up.store(true, Ordering::Relaxed);
        self.look_ups.send_replace(());
    }

    /// Daemons at addresses that are new are added, those at addresses that are gone are not asked any more.
    fn found(&self, name: &Resolving, mut addresses: Vec<SocketAddr>) {
        let mut at = name.found.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = std::collections::HashSet::new();
        addresses.retain(|address| seen.insert(*address));
        let first = addresses.first().copied();
        let one = addresses.len() == 1;
        let before = std::mem::take(&mut *at);
        for address in addresses {
            let known = before.iter().find(|(other, _)| *other == address);
            let daemon = known.map_or_else(
                || {
                    // The system puts the kind of address first that is more likely to work.
                    let rank = usize::from(first.is_some_and(|first| first.is_ipv4() != address.is_ipv4()));
                    let place =
                        if one { name.name.clone() } else { format!("{} ({})", name.name, address.ip()) };
                    Arc::new(Daemon::new(place, rank, dial_to(&name.url, address)))
                },
                |(_, daemon)| Arc::clone(daemon),
            );
            at.push((address, daemon));
        }
        let is_in = |these: &[(SocketAddr, Arc<Daemon>)], daemon: &Arc<Daemon>| {
            these.iter().any(|(_, one)| Arc::ptr_eq(one, daemon))
        };
        let mut state = self.state();
        let preferred = state.daemons.get(state.preferred).cloned();
        state.daemons.retain(|daemon| !is_in(&before, daemon) || is_in(&at, daemon));
        state.daemons.extend(
            at.iter().filter(|(_, daemon)| !is_in(&before, daemon)).map(|(_, daemon)| Arc::clone(daemon)),
        );
        state.daemons.sort_by_key(|daemon| daemon.order);
        state.preferred = preferred.and_then(|daemon| state.position(&daemon)).unwrap_or_default();
    }

    async fn close_idle(&self) {
        loop {
            sleep(IDLE / 2).await;
            let now = Instant::now();
            let preferred = self.state().pick();
            for daemon in self.all_but(|_| false) {
                let is_first = preferred.as_ref().is_some_and(|preferred| Arc::ptr_eq(preferred, &daemon));
                daemon.close_idle(now, is_first);
            }
        }
    }

    /// Looks now and then whether a daemon serves that comes before the one that is asked, and turns back to it.
    async fn come_back(&self) {
        loop {
            sleep(RETURN.mul_f64(1.0 + 2.0 * fastrand::f64())).await;
            let before = {
                let state = self.state();
                state.daemons[..state.preferred.min(state.daemons.len())].to_vec()
            };
            for daemon in before {
                if self.look(&daemon, Instant::now() + LOOKING).await.is_ok() {
                    let mut state = self.state();
                    if let Some(position) = state.position(&daemon) {
                        state.preferred = position;
                        tracing::debug!(daemon = daemon.name, "back at this daemon");
                        self.returned.notify_one();
                    }
                    break;
                }
            }
        }
    }
}

impl State {
    /// The daemon to ask: the preferred one, or the next one that is not barred, if any is not.
    fn pick(&self) -> Option<Arc<Daemon>> {
        let count = self.daemons.len();
        let in_turn = || (0..count).map(|step| &self.daemons[(self.preferred + step) % count]);
        in_turn().find(|daemon| daemon.barred().is_none()).or_else(|| in_turn().next()).cloned()
    }

    fn position(&self, daemon: &Arc<Daemon>) -> Option<usize> {
        self.daemons.iter().position(|other| Arc::ptr_eq(other, daemon))
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Source").field(&self.name).finish()
    }
}

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Endpoints").field("names", &self.names).finish_non_exhaustive()
    }
}

/// A request that says how often it has been sent before.
fn attempt<R>(body: R, before: u32) -> Request<R> {
    let mut request = Request::new(body);
    if before > 0 {
        request.metadata_mut().insert(PREVIOUS_ATTEMPTS, before.into());
    }
    request
}

/// Makes connections to this address. The daemon is still called by the name in `url`.
fn dial_to(url: &Uri, address: SocketAddr) -> Dial {
    let direct = Endpoint::from_shared(format!("http://{address}")).expect("an address makes a URL");
    let endpoint = Builder::tuned(direct).origin(url.clone());
    Arc::new(move || endpoint.connect_lazy())
}

/// Asks a daemon whether it serves leases.
async fn health(channel: Channel) -> Result<Response<()>, Status> {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;

    let service = leased_proto::v1::lease_service_server::SERVICE_NAME.to_owned();
    match HealthClient::new(channel).check(HealthCheckRequest { service }).await {
        Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => Ok(answer.map(drop)),
        Ok(_) => Err(Status::unavailable("the daemon is there and does not serve, or not yet")),
        // It serves other things.
        Err(status) if status.code() == Code::NotFound => {
            Err(Status::unimplemented("it has no such service"))
        }
        Err(status) => Err(status),
    }
}

/// How long to pause before the next try: not at all until every daemon has been asked, then longer after each round.
#[derive(Debug)]
pub(crate) struct Pauses {
    tries: usize,
    pause: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { tries: 0, pause: FIRST_PAUSE }
    }
}

impl Pauses {
    /// Whether nothing has failed yet.
    pub(crate) fn is_first(&self) -> bool {
        self.tries == 0
    }

    /// The pause after another failure of `daemons`, at least as long as one asked for once all have been tried.
    pub(crate) fn next(&mut self, daemons: usize, asked: Option<Duration>) -> Duration {
        self.tries += 1;
        if !self.tries.is_multiple_of(daemons) {
            return Duration::ZERO;
        }
        let pause = self.pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        pause.max(asked.unwrap_or_default().min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
#[path = "endpoints_tests.rs"]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests;
