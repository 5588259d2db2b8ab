//! Records which leases each holder believed in and when, in simulated time, and checks the record.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use leased_client::{FencingGuard, FencingToken};

use super::store::SimulatedStore;

/// Returns the time since the simulation began, which is the same on all hosts.
pub(crate) fn now() -> Duration {
    turmoil::sim_elapsed().expect("a host of a simulation")
}

/// How a lease is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Exclusive,
    /// At most this many may hold at the same time.
    Shared(u32),
}

/// A period in which a holder acted on a key.
#[derive(Debug, Clone)]
struct Span {
    holder: String,
    key: &'static str,
    token: FencingToken,
    mode: Mode,
    from: Duration,
    until: Option<Duration>,
}

/// The record of one simulation. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct History {
    spans: Arc<Mutex<Vec<Span>>>,
    /// A line for each event.
    events: Arc<Mutex<Vec<String>>>,
    failure: Arc<Mutex<Option<String>>>,
    resource: Arc<Resource>,
    done: Arc<AtomicUsize>,
}

/// The resource that the leases protect.
#[derive(Default)]
struct Resource {
    guard: FencingGuard,
    /// The accepted writes, in order.
    accepted: Mutex<Vec<(&'static str, FencingToken)>>,
    refused: AtomicUsize,
}

/// The belief of a holder that it has a lease. The belief ends when this value is dropped.
pub(crate) struct Belief {
    history: History,
    position: usize,
}

impl History {
    /// Notes that a holder begins to act on `key`.
    pub(crate) fn believe(&self, holder: &str, key: &'static str, token: FencingToken, mode: Mode) -> Belief {
        self.note(now(), format_args!("{holder} holds {key} with {token}, {mode:?}"));
        let mut spans = self.spans.lock().unwrap();
        spans.push(Span { holder: holder.to_owned(), key, token, mode, from: now(), until: None });
        Belief { history: self.clone(), position: spans.len() - 1 }
    }

    /// Ends the beliefs of the holders whose names `which` accepts.
    pub(crate) fn end(&self, which: impl Fn(&str) -> bool, at: Duration) {
        for span in self.spans.lock().unwrap().iter_mut().filter(|span| which(&span.holder)) {
            span.until.get_or_insert(at);
        }
    }

    /// Writes to the resource with this token. The resource refuses a stale token.
    pub(crate) fn write(&self, key: &'static str, token: FencingToken) {
        match self.resource.guard.check(key, token) {
            Ok(()) => self.resource.accepted.lock().unwrap().push((key, token)),
            Err(_) => drop(self.resource.refused.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Returns how many stale writes were refused.
    pub(crate) fn refused(&self) -> usize {
        self.resource.refused.load(Ordering::Relaxed)
    }

    /// Returns the first write that was accepted after a write with a greater token.
    pub(crate) fn stale(&self) -> Option<String> {
        let accepted = self.resource.accepted.lock().unwrap();
        accepted.iter().enumerate().find_map(|(position, (key, token))| {
            let before = accepted[..position].iter().rfind(|(other, _)| other == key)?;
            (before.1 > *token).then(|| format!("{key} with {token} after {}", before.1))
        })
    }

    /// Notes an event.
    pub(crate) fn note(&self, at: Duration, what: std::fmt::Arguments<'_>) {
        self.events.lock().unwrap().push(format!("{:9.3} {what}", at.as_secs_f64()));
    }

    /// Notes an event that must not happen. The first one makes the run fail.
    pub(crate) fn fail(&self, at: Duration, what: std::fmt::Arguments<'_>) {
        self.note(at, format_args!("FAILED: {what}"));
        self.failure.lock().unwrap().get_or_insert_with(|| what.to_string());
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap().clone()
    }

    /// Returns all events, one a line.
    pub(crate) fn log(&self) -> String {
        self.events.lock().unwrap().join("\n")
    }

    /// Notes that a program has reached its aim.
    pub(crate) fn done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how many programs have reached their aim.
    pub(crate) fn count_done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Returns the first holders that acted on a key at the same time although their modes forbid
    /// it.
    pub(crate) fn overlap(&self, store: &SimulatedStore) -> Option<String> {
        let mut spans = self.spans.lock().unwrap().clone();
        // A revoked holder may go on until it receives the loss. The operator accepts that, so it
        // does not count as an overlap.
        for span in &mut spans {
            if let Some(revoked) = store.revoked_at(span.token.get()) {
                span.until = Some(span.until.map_or(revoked, |until| until.min(revoked)));
            }
        }
        spans.sort_by_key(|span| span.from);
        spans.iter().enumerate().find_map(|(position, span)| {
            let beside = spans[..position].iter().filter(|other| span.is_beside(other));
            let beside: Vec<&Span> = beside.collect();
            let limit = match span.mode {
                Mode::Exclusive => 0,
                Mode::Shared(limit) => limit as usize - 1,
            };
            let is_alone = beside.iter().all(|other| other.mode != Mode::Exclusive);
            (beside.len() > limit || !is_alone).then(|| format!("{span:?} beside {beside:?}"))
        })
    }

    /// Returns the first exclusive holder whose token is not greater than the previous holder's.
    pub(crate) fn falling_token(&self) -> Option<String> {
        let mut spans = self.spans.lock().unwrap().clone();
        spans.retain(|span| span.mode == Mode::Exclusive);
        spans.sort_by_key(|span| span.from);
        spans.iter().enumerate().find_map(|(position, span)| {
            let before = spans[..position].iter().rfind(|other| other.key == span.key)?;
            (before.token > span.token || (before.token == span.token && before.holder != span.holder))
                .then(|| format!("{span:?} after {before:?}"))
        })
    }
}

impl Span {
    /// Returns whether `earlier` belongs to another lease on the same key and has not ended when
    /// this period begins.
    fn is_beside(&self, earlier: &Self) -> bool {
        self.key == earlier.key
            && self.token != earlier.token
            && earlier.until.is_none_or(|until| until > self.from)
    }
}

impl Drop for Belief {
    fn drop(&mut self) {
        let mut spans = self.history.spans.lock().unwrap();
        let span = &mut spans[self.position];
        // A crashed process has no beliefs left to end, and its host has no current time.
        if span.until.is_none() {
            span.until = Some(now());
            let (holder, key, token) = (span.holder.clone(), span.key, span.token);
            drop(spans);
            self.history.note(now(), format_args!("{holder} stops acting on {key} with {token}"));
        }
    }
}
