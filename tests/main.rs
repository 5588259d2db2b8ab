//! Integration tests: what leased promises, tested over real gRPC on the embedded store and on a
//! real MongoDB. One binary, with a module for each behaviour. Each test has its own data folder or
//! database.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]

/// Daemons in this process, requests, and the tools that several tests use.
mod support;

/// Acquire: one exclusive holder, rising fencing tokens, and calls that may be repeated.
mod acquire;
/// Coalescing: a touch that follows another closely is answered without a write.
mod coalescing;
/// The connections of the client crate: many calls, silent connections, host names, long timeouts.
mod connections;
/// How many database commands an operation takes.
mod cost;
/// The programs that the documentation shows.
mod documents;
/// A replica set that loses its primary.
mod failover;
/// A caller with few requests beside callers with very many.
mod fairness;
/// A store that fails, a record that is deleted, a daemon that restarts.
mod faults;
/// Several daemons over one database.
mod fleet;
/// The client crate against real daemons: leases that renew themselves.
mod holder;
/// Invalid requests, and valid ones that look dangerous.
mod hostile;
/// The identity of the store, which every answer includes.
mod identity;
/// Get and List.
mod inspect;
/// Renewing leases on a keepalive stream.
mod keepalive;
/// The example workers in other languages.
mod languages;
/// Large answers to Get and List, and callers that do not read them.
mod large;
/// Losses that the daemon pushes on a keepalive stream.
mod losses;
/// Limits of messages: the spelling of ids, sizes, and the refusal of single leases.
mod messages;
/// The daemon's metrics.
mod metrics;
/// Calls that fail during an outage of the store leave no lease.
mod outages;
/// Peers that are silent, slow, too fast, or too many.
mod peers;
/// The links and the spelling of the documentation.
mod prose;
/// Proxies between callers and daemons.
mod proxies;
/// Purges keys that have long been unused.
mod purge;
/// Waiting in the queue of a key, with one daemon and with two.
mod queue;
/// Releasing a lease, and the waiter that is granted the key next.
mod release;
/// Revoking leases.
mod revoke;
/// The health service, readiness, reflection, and drain.
mod serving;
/// Lease ids that are released early, repeated, or used for a different request.
mod settling;
/// Shared leases.
mod shared;
/// The client and the daemon over a simulated network.
mod simulation;
/// Renewing one lease with a Touch call.
mod touch;
/// Streams whose callers do not read the answers.
mod unread_answers;
/// A damaged record among healthy ones.
mod unreadable;
/// Watching keys.
mod watch;
/// The API's compatibility with its last release.
mod wire_contract;
