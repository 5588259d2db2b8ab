//! A line per change.

use std::time::SystemTime;

use leased_client::{Client, KeyInfo, WatchEvent};
use tokio_stream::StreamExt;

use crate::failure::Failure;
use crate::json::{Event, change, state, time};
use crate::output::{Output, complain, json};
use crate::table;

/// Prints what happens, until a signal ends the process or nobody reads on.
pub(crate) async fn watch(client: &Client, prefix: String, output: &mut Output) -> Result<u8, Failure> {
    // A watch waits for daemons for as long as it takes. Whoever starts one wants to know that there is none.
    let mut first = client.list(prefix.clone()).page_size(1).stream();
    first.try_next().await?;
    let mut events = client.watch(prefix).stream();
    loop {
        let event = tokio::select! {
            biased;
            event = events.try_next() => event?,
            // Noticed without a change to print as well.
            () = output.unread() => return Err(Failure::NobodyReads),
        };
        let Some(event) = event else { return Ok(0) };
        let line = match output.is_json() {
            true => Event::of(&event).map(|event| json(&event)).transpose()?,
            false => text(&event),
        };
        if let Some(line) = line {
            output.line(&line)?;
        }
    }
}

/// The line for people, if the event needs one.
fn text(event: &WatchEvent) -> Option<String> {
    match event {
        WatchEvent::Snapshot(key) => Some(line(state(key.state), key)),
        WatchEvent::Change { kind, key } => Some(line(change(*kind), key)),
        WatchEvent::Interrupted { cause } => {
            complain(&format!(
                "the watch was interrupted ({cause}); it begins anew as soon as a daemon answers"
            ));
            None
        }
        // The end of a snapshot, or something of a later version.
        _ => None,
    }
}

fn line(word: &str, key: &KeyInfo) -> String {
    #[expect(
        clippy::disallowed_methods,
        reason = "for people: when this line was printed; it decides nothing"
    )]
    let now = time(SystemTime::now());
    let holders = table::holders(&key.holders);
    format!(
        "{now}  {word:<10}  {}  token {}  holder {holders}  waiting {}",
        table::plain(&key.key),
        key.token,
        key.waiters.len()
    )
}
