//! What holders believed and when, in the simulation's one time, and what must be true of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use leased_client::{FencingGuard, FencingToken};

use super::store::SimulatedStore;

/// The time since the simulation began, the same on all hosts.
pub(crate) fn now() -> Duration {
    turmoil::sim_elapsed().expect("a host of a simulation")
}

/// How a lease is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Exclusive,
    /// Beside fewer than so many others.
    Shared(u32),
}

/// A time in which a holder acted on a key.
#[derive(Debug, Clone)]
struct Span {
    holder: String,
    key: &'static str,
    token: FencingToken,
    mode: Mode,
    from: Duration,
    until: Option<Duration>,
}

/// All that is noted of one simulation. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct History {
    spans: Arc<Mutex<Vec<Span>>>,
    /// What happened, in words.
    events: Arc<Mutex<Vec<String>>>,
    failure: Arc<Mutex<Option<String>>>,
    resource: Arc<Resource>,
    done: Arc<AtomicUsize>,
}

/// What the leases protect.
#[derive(Default)]
struct Resource {
    guard: FencingGuard,
    /// Writes let through, in their order.
    done: Mutex<Vec<(&'static str, FencingToken)>>,
    refused: AtomicUsize,
}

/// A belief that lasts until it is dropped.
pub(crate) struct Believing {
    history: History,
    position: usize,
}

impl History {
    /// Somebody begins to act on `key`.
    pub(crate) fn believe(
        &self,
        holder: &str,
        key: &'static str,
        token: FencingToken,
        mode: Mode,
    ) -> Believing {
        self.note(now(), format_args!("{holder} holds {key} with {token}, {mode:?}"));
        let mut spans = self.spans.lock().unwrap();
        spans.push(Span { holder: holder.to_owned(), key, token, mode, from: now(), until: None });
        Believing { history: self.clone(), position: spans.len() - 1 }
    }

    /// Processes end, and believe nothing any more.
    pub(crate) fn end(&self, which: impl Fn(&str) -> bool, at: Duration) {
        for span in self.spans.lock().unwrap().iter_mut().filter(|span| which(&span.holder)) {
            span.until.get_or_insert(at);
        }
    }

    /// A write under the lease with this token reaches the resource.
    pub(crate) fn write(&self, key: &'static str, token: FencingToken) {
        match self.resource.guard.check(key, token) {
            Ok(()) => self.resource.done.lock().unwrap().push((key, token)),
            Err(_) => drop(self.resource.refused.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// How many writes came too late and were refused.
    pub(crate) fn refused(&self) -> usize {
        self.resource.refused.load(Ordering::Relaxed)
    }

    /// The first write that was let through after one of a later holder.
    pub(crate) fn stale(&self) -> Option<String> {
        let done = self.resource.done.lock().unwrap();
        done.iter().enumerate().find_map(|(position, (key, token))| {
            let before = done[..position].iter().rfind(|(other, _)| other == key)?;
            (before.1 > *token).then(|| format!("{key} with {token} after {}", before.1))
        })
    }

    /// Notes what happens.
    pub(crate) fn note(&self, at: Duration, what: std::fmt::Arguments<'_>) {
        self.events.lock().unwrap().push(format!("{:9.3} {what}", at.as_secs_f64()));
    }

    /// Notes what must not happen. The first stays.
    pub(crate) fn fail(&self, at: Duration, what: std::fmt::Arguments<'_>) {
        self.note(at, format_args!("WRONG: {what}"));
        self.failure.lock().unwrap().get_or_insert_with(|| what.to_string());
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap().clone()
    }

    /// What happened, line by line.
    pub(crate) fn told(&self) -> String {
        self.events.lock().unwrap().join("\n")
    }

    /// A program has done what it was for.
    pub(crate) fn done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// How many have.
    pub(crate) fn count_done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// The first two that acted on a key at the same time and should not have.
    pub(crate) fn overlap(&self, store: &SimulatedStore) -> Option<String> {
        let mut spans = self.spans.lock().unwrap().clone();
        // Who is revoked acts on until told; the operator knows.
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

    /// The first exclusive holder whose token is not greater than that of one before.
    pub(crate) fn regress(&self) -> Option<String> {
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
    /// Whether this one begins while another acts on the same key under another lease.
    fn is_beside(&self, earlier: &Self) -> bool {
        self.key == earlier.key
            && self.token != earlier.token
            && earlier.until.is_none_or(|until| until > self.from)
    }
}

impl Drop for Believing {
    fn drop(&mut self) {
        let mut spans = self.history.spans.lock().unwrap();
        let span = &mut spans[self.position];
        // A process that crashed has ended its beliefs already, and has no time of its own any more.
        if span.until.is_none() {
            span.until = Some(now());
            let (holder, key, token) = (span.holder.clone(), span.key, span.token);
            drop(spans);
            self.history.note(now(), format_args!("{holder} leaves off {key} with {token}"));
        }
    }
}
