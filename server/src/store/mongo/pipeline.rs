//! The rules as one aggregation pipeline over a whole batch of different edits.
//!
//! It says what [`crate::lease::step`] says, in the database's own language, because only the database's clock and
//! its atomicity can decide between daemons. The pipeline is the same for every record; what differs per key stands
//! in a constant table inside it, looked up by the position of the key. Everything that came from a caller stands
//! under `$literal`, where a string that begins with `$` is just a string. Stages that no edit of the batch needs
//! are left out: most of the cost of a lone edit is the parsing.

use mongodb::bson::{Bson, Document, doc};

use super::document::{EDITED_AT, MARK, acquisition, long, reason, uuid};
use super::expression::{bind, filter, ids, literal, map, not};
use crate::lease::{Edit, Key, MAX_RECORD_BYTES, MAX_WAITERS, REMEMBERED_DEPARTURES, Reason, Rules};

/// More than any array of a record holds; `$slice` wants a count.
const ALL: i32 = i32::MAX;

/// A field that is set to this is none.
const GONE: &str = "$$REMOVE";

/// The instant at which a pipeline acts: the clock of the database.
pub(super) const CLOCK: &str = "$$NOW";

/// The stages that apply each key's edit to its record at `now`, an expression, and leave `mark` in it.
pub(super) fn pipeline(batch: &[(Key, Edit)], rules: &Rules, now: &Bson, mark: i64) -> Vec<Document> {
    let parts = Parts::of(batch);
    let source = Source::new(batch, &parts);
    let mut stages = vec![begin(&source)];
    if parts.touch || parts.release || parts.revoke {
        let Held { stay, gone, blocked_until } = Held::after(&parts, &source, now);
        let mut fields = doc! { "holders": stay };
        if parts.release || parts.revoke {
            fields.insert("gone", gone);
        }
        fields.extend(blocked_until.map(|until| ("blocked_until".to_owned(), until)));
        stages.push(doc! { "$set": fields });
    }
    if parts.cancel || parts.enqueue {
        stages.push(edit_line(&parts, &source, rules, now));
    }
    stages.push(admit(rules, now));
    stages.push(finish(&parts, rules, now, mark));
    stages
}

/// The same, for less, for edits with which nobody comes, at keys where nobody waits: there is nobody to admit.
pub(super) fn without_line(batch: &[(Key, Edit)], now: &Bson, mark: i64) -> Vec<Document> {
    let parts = Parts::of(batch);
    let source = Source::new(batch, &parts);
    let Held { stay, gone, blocked_until } = Held::after(&parts, &source, now);
    let rev = doc! { "$add": ["$rev", 1_i64] };
    let mut fields = doc! { "holders": stay, "rev": rev.clone(), EDITED_AT: now.clone(), MARK: mark };
    if parts.release || parts.revoke {
        fields.insert("departures", remembered(gone));
    }
    fields.extend(blocked_until.map(|until| ("blocked_until".to_owned(), until)));
    match parts.loud {
        Loudness::All => drop(fields.insert("epoch", rev)),
        Loudness::Some => drop(fields.insert("epoch", doc! { "$cond": ["$edit.loud", rev, "$epoch"] })),
        Loudness::None => {}
    }
    let mut stages = Vec::new();
    if let Source::Table(own) = source {
        stages.push(doc! { "$set": { "edit": own } });
        fields.insert("edit", GONE);
    }
    stages.push(doc! { "$set": fields });
    stages
}

/// Which lists are not empty in every edit of the batch.
struct Parts {
    touch: bool,
    release: bool,
    revoke: bool,
    cancel: bool,
    enqueue: bool,
    loud: Loudness,
}

impl Parts {
    fn of(batch: &[(Key, Edit)]) -> Self {
        let has = |part: fn(&Edit) -> bool| batch.iter().any(|(_, edit)| !part(edit));
        Self {
            touch: has(|edit| edit.touched().is_empty()),
            release: has(|edit| edit.released().is_empty()),
            revoke: has(|edit| edit.revoked().is_empty()),
            cancel: has(|edit| edit.cancelled().is_empty()),
            enqueue: has(|edit| edit.enqueued().is_empty()),
            loud: Loudness::of(batch),
        }
    }
}

/// Which edits of a batch others should hear of: those with more than touches in them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loudness {
    All,
    None,
    Some,
}

impl Loudness {
    fn of(batch: &[(Key, Edit)]) -> Self {
        let loud = batch.iter().filter(|(_, edit)| is_loud(edit)).count();
        match loud {
            0 => Self::None,
            _ if loud == batch.len() => Self::All,
            _ => Self::Some,
        }
    }
}

fn is_loud(edit: &Edit) -> bool {
    !edit.released().is_empty()
        || !edit.revoked().is_empty()
        || !edit.cancelled().is_empty()
        || !edit.enqueued().is_empty()
}

/// Where a stage finds a record's own edit: in the table, or in the stage itself when all are the same, as a single one or
/// nudges are.
enum Source {
    Table(Document),
    Inline(Document),
}

impl Source {
    fn new(batch: &[(Key, Edit)], parts: &Parts) -> Self {
        match batch {
            [(_, edit), rest @ ..] if rest.iter().all(|(_, other)| other == edit) => {
                Self::Inline(encode(edit, parts))
            }
            _ => Self::Table(looked_up(batch, |edit| encode(edit, parts).into())),
        }
    }

    /// An expression for one of the edit's lists.
    fn list(&self, name: &str) -> Bson {
        match self {
            Self::Table(_) => format!("$edit.{name}").into(),
            Self::Inline(edit) => literal(edit.get(name).cloned().unwrap_or_else(|| Bson::Array(Vec::new()))),
        }
    }
}

fn encode(edit: &Edit, parts: &Parts) -> Document {
    let mut lists = Document::new();
    let mut list = |wanted: bool, name: &str, values: Vec<Bson>| {
        if wanted {
            lists.insert(name, values);
        }
    };
    list(parts.touch, "touch", edit.touched().iter().map(|&id| uuid(id)).collect());
    list(parts.release, "release", edit.released().iter().map(|&id| uuid(id)).collect());
    list(parts.revoke, "revoke", edit.revoked().iter().map(|token| Bson::Int64(token.0)).collect());
    list(parts.cancel, "cancel", edit.cancelled().iter().map(|&id| uuid(id)).collect());
    list(parts.enqueue, "enqueue", edit.enqueued().iter().map(|who| acquisition(who).into()).collect());
    if parts.loud == Loudness::Some && is_loud(edit) {
        lists.insert("loud", true);
    }
    lists
}

/// What belongs to a record's key: a constant table, looked up by the position of the key.
fn looked_up(batch: &[(Key, Edit)], value: impl Fn(&Edit) -> Bson) -> Document {
    let keys: Vec<Bson> = batch.iter().map(|(key, _)| key.as_str().into()).collect();
    let values: Vec<Bson> = batch.iter().map(|(_, edit)| value(edit)).collect();
    let position = doc! { "$indexOfArray": [literal(keys.into()), "$_id"] };
    doc! { "$arrayElemAt": [literal(values.into()), position] }
}

/// Makes a record whole and lays its edit beside it.
fn begin(source: &Source) -> Document {
    let mut fields = doc! {
        "token": { "$ifNull": ["$token", 0_i64] },
        "holders": { "$ifNull": ["$holders", []] },
        "waiters": { "$ifNull": ["$waiters", []] },
        "departures": { "$ifNull": ["$departures", []] },
    };
    if let Source::Table(own) = source {
        fields.insert("edit", own.clone());
    }
    doc! { "$set": fields }
}

/// What touch, release and revoke make of the holders, as expressions.
struct Held {
    stay: Bson,
    /// The departures of this edit, newest first.
    gone: Document,
    /// If it may have changed.
    blocked_until: Option<Bson>,
}

impl Held {
    fn after(parts: &Parts, source: &Source, now: &Bson) -> Self {
        let released = doc! { "$in": ["$$h.id", source.list("release")] };
        let revoked = doc! { "$in": ["$$h.token", source.list("revoke")] };
        let (mut stay, mut gone, mut blocked_until) = (Bson::from("$holders"), Vec::new(), None);
        if parts.revoke {
            let mut which = vec![revoked.clone()];
            if parts.release {
                which.push(not(&released));
            }
            gone.push(note(&filter("$holders", "h", doc! { "$and": which }), Reason::Revoked, now));
            stay = filter(stay, "h", not(&revoked));
        }
        if parts.release {
            let leaving = filter("$holders", "h", released.clone());
            gone.push(note(&leaving, Reason::Released, now));
            stay = filter(stay, "h", not(&released));
            let bound = filter(leaving, "h", doc! { "$gt": ["$$h.min_hold", 0_i64] });
            let held_until = map(bound, "h", doc! { "$add": ["$$h.acquired_at", "$$h.min_hold"] });
            blocked_until = Some(doc! { "$max": ["$blocked_until", { "$max": held_until }] }.into());
        }
        if parts.touch {
            stay = renewed(stay, source.list("touch"), now);
        }
        Self { stay, gone: doc! { "$concatArrays": gone }, blocked_until }
    }
}

/// The `holders`, those with these ids touched.
fn renewed(holders: impl Into<Bson>, ids: impl Into<Bson>, now: &Bson) -> Bson {
    let until = doc! { "$max": ["$$h.expires_at", { "$add": [now.clone(), "$$h.ttl"] }] };
    let touched = doc! { "$mergeObjects": ["$$h", { "expires_at": until }] };
    let is_touched = doc! { "$in": ["$$h.id", ids.into()] };
    map(holders, "h", doc! { "$cond": [is_touched, touched, "$$h"] })
}

/// Cancel and enqueue.
fn edit_line(parts: &Parts, source: &Source, rules: &Rules, now: &Bson) -> Document {
    let mut line = Bson::from("$waiters");
    if parts.cancel {
        line = filter(line, "w", not(&doc! { "$in": ["$$w.id", source.list("cancel")] }));
    }
    if parts.enqueue {
        line = arrive(line, parts, source, rules, now);
    }
    doc! { "$set": { "waiters": line } }
}

/// The `line` with the arrivals at its end, as far as there is room.
fn arrive(line: Bson, parts: &Parts, source: &Source, rules: &Rules, now: &Bson) -> Bson {
    let until = doc! { "$add": [now.clone(), long(rules.place)] };
    let named = ids(source.list("enqueue"));
    let stay = doc! { "expires_at": { "$max": ["$$w.expires_at", until.clone()] } };
    let refreshed = map(
        "$$line",
        "w",
        doc! { "$cond": [{ "$in": ["$$w.id", "$$named"] }, { "$mergeObjects": ["$$w", stay] }, "$$w"] },
    );
    let mut known = vec!["$holders.id", "$$line.id", "$departures.id"];
    if parts.release || parts.revoke {
        known.push("$gone.id");
    }
    let is_new = doc! { "$not": [{ "$in": ["$$a.id", "$$known"] }] };
    let place = doc! { "$mergeObjects": ["$$a", { "since": now.clone(), "expires_at": until }] };
    let arrivals = map(filter(source.list("enqueue"), "a", is_new), "a", place);
    let size = doc! { "$add": [{ "$sum": "$holders.size" }, { "$sum": "$$line.size" }] };
    let room = doc! { "$and": [
        { "$lt": [{ "$size": "$$line" }, i32::try_from(MAX_WAITERS).unwrap_or(ALL)] },
        { "$lt": [size, i64::try_from(MAX_RECORD_BYTES).unwrap_or(i64::MAX)] },
    ] };
    let lasting = filter("$$refreshed", "w", doc! { "$gt": ["$$w.expires_at", now.clone()] });
    let outcome = doc! { "$switch": {
        "branches": [
            { "case": { "$eq": ["$$arrivals", []] }, "then": "$$refreshed" },
            { "case": room, "then": { "$concatArrays": ["$$refreshed", "$$arrivals"] } },
        ],
        "default": lasting,
    } };
    let outcome = bind(doc! { "refreshed": refreshed, "arrivals": arrivals }, outcome);
    let outcome = bind(doc! { "known": { "$concatArrays": known }, "named": named }, outcome);
    bind(doc! { "line": line }, outcome)
}

/// Goes down the line while its head fits. Leaves in `admission`: how many left the line (`left`), the holders made
/// (`granted`) and the last token; null when nobody waits or the key is blocked.
fn admit(rules: &Rules, now: &Bson) -> Document {
    let live = filter("$holders", "h", live(rules, now));
    let of_mode = |mode: &str| {
        let those = filter("$$live", "h", doc! { "$eq": ["$$h.mode", mode] });
        doc! { "$size": those }
    };
    let start = doc! {
        "open": true,
        "left": 0,
        "exclusive": of_mode("exclusive"),
        "shared": of_mode("shared"),
        "token": "$token",
        "granted": [],
    };
    let is_exclusive = doc! { "$eq": ["$$this.mode", "exclusive"] };
    let room = doc! { "$cond": [
        is_exclusive.clone(),
        { "$eq": ["$$value.shared", 0] },
        { "$lt": ["$$value.shared", "$$this.shared_limit"] },
    ] };
    let fits = doc! { "$and": ["$$value.open", { "$eq": ["$$value.exclusive", 0] }, room] };
    let left = doc! { "$add": ["$$value.left", 1] };
    let one_more = |mode: &str, yes: i32, no: i32| {
        doc! { "$add": [format!("$$value.{mode}"), { "$cond": [is_exclusive.clone(), yes, no] }] }
    };
    let granted = bind(
        doc! { "token": { "$max": [{ "$add": ["$$value.token", 1_i64] }, { "$toLong": now.clone() }] } },
        doc! {
            "open": true,
            "left": left.clone(),
            "exclusive": one_more("exclusive", 1, 0),
            "shared": one_more("shared", 0, 1),
            "token": "$$token",
            "granted": { "$concatArrays": ["$$value.granted", [holder(now)]] },
        },
    );
    let next = doc! { "$switch": {
        "branches": [
            { "case": not(&fits), "then": { "$mergeObjects": ["$$value", { "open": false }] } },
            {
                "case": { "$lte": ["$$this.expires_at", now.clone()] },
                "then": { "$mergeObjects": ["$$value", { "left": left }] },
            },
        ],
        "default": granted,
    } };
    let walk = bind(
        doc! { "live": live },
        doc! { "$reduce": { "input": "$waiters", "initialValue": start, "in": next } },
    );
    let nobody = doc! { "$or": [
        { "$eq": ["$waiters", []] },
        { "$gt": ["$blocked_until", now.clone()] },
    ] };
    doc! { "$set": { "admission": { "$cond": [nobody, Bson::Null, walk] } } }
}

/// The holder that the waiter `$$this` becomes, with `$$token`.
fn holder(now: &Bson) -> Document {
    let mut holder = doc! {
        "token": "$$token",
        "acquired_at": now.clone(),
        "expires_at": { "$add": [now.clone(), "$$this.ttl"] },
    };
    for field in ["id", "owner", "metadata", "mode", "ttl", "min_hold", "size"] {
        holder.insert(field, format!("$$this.{field}"));
    }
    holder
}

/// Puts the admission into effect; those who came only to try leave; `rev` rises, and `epoch` with it unless all was
/// quiet.
fn finish(parts: &Parts, rules: &Rules, now: &Bson, mark: i64) -> Document {
    let any = doc! { "$gt": [{ "$size": { "$ifNull": ["$admission.granted", []] } }, 0] };
    let live = live(rules, now);
    let displaced = note(&filter("$holders", "h", not(&live)), Reason::Displaced, now);
    let stay = filter("$holders", "h", live);
    let mut gone = vec![Bson::from(doc! { "$cond": [any.clone(), displaced, []] })];
    if parts.release || parts.revoke {
        gone.push("$gone".into());
    }
    let rest = doc! { "$slice": ["$waiters", { "$ifNull": ["$admission.left", 0] }, ALL] };
    let rev = doc! { "$add": [{ "$ifNull": ["$rev", 0_i64] }, 1_i64] };
    doc! { "$set": {
        "token": { "$ifNull": ["$admission.token", "$token"] },
        "holders": { "$cond": [any, { "$concatArrays": [stay, "$admission.granted"] }, "$holders"] },
        "waiters": filter(rest, "w", "$$w.wait"),
        "departures": remembered(doc! { "$concatArrays": gone }),
        "epoch": epoch(parts.loud, &rev),
        "rev": rev,
        EDITED_AT: now.clone(),
        MARK: mark,
        "edit": GONE,
        "gone": GONE,
        "admission": GONE,
    } }
}

/// The departures with those of this edit before them.
fn remembered(gone: Document) -> Bson {
    let count = doc! { "$max": [i32::try_from(REMEMBERED_DEPARTURES).unwrap_or(ALL), { "$size": "$$gone" }] };
    let all = doc! { "$concatArrays": ["$$gone", "$departures"] };
    bind(doc! { "gone": gone }, doc! { "$slice": [all, count] })
}

/// The revision of the latest edit that others should hear of: one with more than touches, or one that moved the line.
fn epoch(loud: Loudness, rev: &Document) -> Bson {
    let moved = doc! { "$gt": ["$admission.left", 0] };
    let told = match loud {
        Loudness::All => return rev.clone().into(),
        Loudness::None => moved,
        Loudness::Some => doc! { "$or": ["$edit.loud", moved] },
    };
    doc! { "$cond": [told, rev.clone(), "$epoch"] }.into()
}

/// Whether nobody may take the place of the holder `$$h` yet.
fn live(rules: &Rules, now: &Bson) -> Document {
    doc! { "$gt": [{ "$add": ["$$h.expires_at", long(rules.grace)] }, now.clone()] }
}

fn note(gone: &Bson, why: Reason, now: &Bson) -> Bson {
    map(gone.clone(), "h", doc! { "id": "$$h.id", "reason": reason(why), "at": now.clone() })
}
