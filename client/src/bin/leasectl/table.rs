//! Answers for people: aligned columns without borders. Only the answer of `acquire` shows a lease
//! id.

use std::time::Duration;

use comfy_table::{Cell, ContentArrangement, Table, presets::NOTHING};
use humantime::format_duration;
use leased_client::{HolderInfo, KeyInfo, Mode, WaiterInfo};

use crate::json::{mode, state, time};

/// The most characters in the first column. A longer name is on a separate line, above the rest of
/// its row.
const WIDE: usize = 48;

/// Formats a table of `rows` under a header.
pub(crate) fn rows<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    let mut above = Vec::new();
    for (index, mut row) in rows.into_iter().enumerate() {
        if let Some(name) = row.first_mut().filter(|name| name.chars().count() > WIDE) {
            above.push((index, std::mem::take(name)));
        }
        table.add_row(row.map(Cell::new));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    for (index, name) in above.into_iter().rev() {
        lines.insert(index + 1, name);
    }
    lines.join("\n")
}

/// Formats keys, one row each.
pub(crate) fn keys(keys: &[KeyInfo]) -> String {
    rows(["KEY", "STATE", "HOLDER", "TOKEN", "LEFT", "WAITING"], keys.iter().map(key_row))
}

fn key_row(info: &KeyInfo) -> [String; 6] {
    let left = info.holders.iter().map(|holder| holder.remaining).max();
    [
        plain(&info.key),
        state(info.state).to_owned(),
        short(holders(&info.holders)),
        info.token.to_string(),
        left.map_or_else(|| "-".to_owned(), duration),
        info.waiters.len().to_string(),
    ]
}

/// Cuts a text to what fits into a column. `get` shows the whole text.
fn short(text: String) -> String {
    if text.chars().count() <= WIDE {
        return text;
    }
    text.chars().take(WIDE - 1).chain(['…']).collect()
}

/// Summarizes the holders: the first one, and how many more there are.
pub(crate) fn holders(holders: &[HolderInfo]) -> String {
    match holders {
        [] => "-".to_owned(),
        [holder] => plain(&holder.owner),
        [holder, others @ ..] => format!("{} and {} more", plain(&holder.owner), others.len()),
    }
}

/// Formats everything that is known of one key.
pub(crate) fn key(info: &KeyInfo) -> String {
    let mut text = format!("{}  {}  token {}", plain(&info.key), state(info.state), info.token);
    if let Some(until) = info.blocked_until {
        text += &format!("\nblocked until {}", time(until));
    }
    if !info.holders.is_empty() {
        let header = ["HOLDER", "MODE", "TOKEN", "LEFT", "TTL", "SINCE", "METADATA"];
        text += &format!("\n\n{}", rows(header, info.holders.iter().map(holder_row)));
    }
    if !info.waiters.is_empty() {
        let waiters = info.waiters.iter().enumerate().map(waiter_row);
        text += &format!("\n\n{}", rows(["POSITION", "WAITER", "MODE", "SINCE"], waiters));
    }
    text
}

fn holder_row(holder: &HolderInfo) -> [String; 7] {
    let label = |(name, value): (&String, &String)| format!("{}={}", plain(name), plain(value));
    let labels: Vec<String> = holder.metadata.iter().map(label).collect();
    [
        plain(&holder.owner),
        mode_and_limit(holder.mode, holder.shared_limit),
        holder.token.to_string(),
        duration(holder.remaining),
        duration(holder.ttl),
        time(holder.acquired_at),
        if labels.is_empty() { "-".to_owned() } else { labels.join(" ") },
    ]
}

fn waiter_row((index, waiter): (usize, &WaiterInfo)) -> [String; 4] {
    let mode = mode_and_limit(waiter.mode, waiter.shared_limit);
    [(index + 1).to_string(), plain(&waiter.owner), mode, time(waiter.since)]
}

/// Formats a mode, with the limit if it is shared and has one.
fn mode_and_limit(held: Mode, limit: u32) -> String {
    match (held, limit) {
        (Mode::Shared, 1..) => format!("{}, at most {limit}", mode(held)),
        _ => mode(held).to_owned(),
    }
}

/// Formats a duration for people: in milliseconds below ten seconds, else in seconds.
pub(crate) fn duration(duration: Duration) -> String {
    let rounded = match duration {
        short if short < Duration::from_secs(10) => Duration::from_millis(short.as_millis() as u64),
        long => Duration::from_secs(long.as_secs()),
    };
    format_duration(rounded).to_string()
}

/// Escapes the characters of a text that could control a terminal. Anyone can choose keys and
/// labels, so none is printed unescaped.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        if is_deceptive(character) {
            plain.extend(character.escape_default());
        } else {
            plain.push(character);
        }
    }
    plain
}

/// Whether a character can make text look like other text. These are control characters, separators
/// of lines and paragraphs, and the controls of Unicode's bidirectional algorithm (UAX #9, 2),
/// which reorder the text beside them. The daemon's log escapes the same characters.
pub(crate) fn is_deceptive(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_no_finer_than_people_need() {
        assert_eq!(duration(Duration::from_micros(9_876_543)), "9s 876ms");
        assert_eq!(duration(Duration::from_millis(29_999)), "29s");
        assert_eq!(duration(Duration::ZERO), "0s");
    }

    #[test]
    fn one_long_name_does_not_widen_the_other_rows() {
        let long = "k".repeat(512);
        let shown = rows(
            ["KEY", "STATE"],
            [["a", "held"], [&long, "free"], ["b", "held"]].map(|row| row.map(str::to_owned)),
        );
        let expected = format!("KEY  STATE\na    held\n{long}\n     free\nb    held");
        assert_eq!(shown, expected);
        assert_eq!(short(long).chars().count(), WIDE);
    }

    #[test]
    fn labels_cannot_control_a_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        let deceptive = "\u{9b}\u{61c}\u{200e}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}";
        assert_eq!(plain(deceptive), deceptive.escape_default().to_string());
        assert_eq!(plain("é漢字 \u{200d}\u{301}"), "é漢字 \u{200d}\u{301}", "writing needs these");
    }
}
