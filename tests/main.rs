//! What leased promises, tried over real gRPC, with the embedded store and against a real MongoDB. One binary; a module
//! for each behaviour, a folder or a database for each test.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]

mod support;

/// Grants: one holder, rising tokens, repeatable calls.
mod acquire;
/// Touches that memory does for.
mod coalescing;
/// The connections of the client crate.
mod connections;
/// What things cost in commands to the database.
mod cost;
/// What the documents say, tried.
mod documents;
/// A replica set that loses its primary.
mod failover;
/// Callers who ask for much beside one who asks for little.
mod fairness;
/// A store that fails, a document that vanishes, a daemon that ends.
mod faults;
/// Several daemons over one database.
mod fleet;
/// The client crate: leases that keep themselves.
mod holder;
/// Requests that are wrong, and requests that only look so.
mod hostile;
/// Which store answers.
mod identity;
/// Looking at keys.
mod inspect;
/// Renewing leases on a stream.
mod keepalive;
/// The examples in other languages.
mod languages;
/// Large answers, and callers who do not take them.
mod large;
/// What a stream is told unasked.
mod losses;
/// What messages may be: ids, sizes, refusals, and what is refused alone.
mod messages;
/// What a daemon counts.
mod metrics;
/// What calls leave behind that end while the store is away.
mod outages;
/// Peers that are silent, slow, hasty, or too many.
mod peers;
/// Proxies between callers and daemons.
mod proxies;
/// Keys that nobody needs any more.
mod purge;
/// Waiting in line, over one daemon and two.
mod queue;
/// Giving back, and who is next.
mod release;
/// Taking leases away.
mod revoke;
/// Health, reflection, drain.
mod serving;
/// Ids that are over before, while or after they are asked for.
mod settling;
/// Shared leases.
mod shared;
/// The client and the daemon over a simulated network.
mod simulation;
/// Renewing one lease.
mod touch;
/// A document that is no record, among those of others.
mod unreadable;
/// What streams are told and nobody takes.
mod untaken;
/// Watching keys.
mod watch;
/// The API stays as it is.
mod wire_contract;
