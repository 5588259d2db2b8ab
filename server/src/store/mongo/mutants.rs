//! Mutants of the pipeline. Tests must catch each of them.

use mongodb::bson::{Bson, Document, doc};

use crate::store::conformance::mutants::Mutant;

/// Changes the pipeline into a mutant.
pub(super) fn put_into(mut stages: Vec<Document>, mutant: Mutant) -> Vec<Document> {
    let waiters =
        |mode: &str| doc! { "$filter": { "input": "$waiters", "cond": { "$eq": ["$$this.mode", mode] } } };
    match mutant {
        Mutant::TokenResetOnRelease => {
            let free = doc! { "$eq": ["$holders", []] };
            stages.push(doc! { "$set": { "token": { "$cond": [free, 0_i64, "$token"] } } });
        }
        Mutant::SharedOvertakes => {
            let queue = doc! { "$concatArrays": [waiters("shared"), waiters("exclusive")] };
            stages.insert(
                0,
                doc! { "$set": { "waiters": { "$cond": [{ "$isArray": "$waiters" }, queue, []] } } },
            );
        }
        Mutant::RevisionKept => set(&mut stages, "rev", "$rev".into()),
        Mutant::MinHoldIgnored => set(&mut stages, "blocked_until", "$blocked_until".into()),
        Mutant::DeparturesForgotten => stages.push(doc! { "$set": { "departures": [] } }),
        Mutant::TouchWithoutId => replace(&mut stages, |operator, operands| {
            let [Bson::Document(_), touched, Bson::String(holder)] = operands else { return None };
            (operator == "$cond" && holder == "$$h").then(|| touched.clone())
        }),
        Mutant::ReleaseWithoutId => replace(&mut stages, |operator, operands| {
            (operator == "$in" && operands.first()? == &"$$h.id".into()).then_some(true.into())
        }),
        Mutant::LapsedWaiterAdmitted => replace(&mut stages, |operator, operands| {
            (operator == "$lte" && operands.first()? == &"$$this.expires_at".into()).then_some(false.into())
        }),
        Mutant::GraceIgnored => replace(&mut stages, |operator, operands| {
            let expiry = operands.first()?;
            (operator == "$add" && expiry == &"$$h.expires_at".into()).then(|| expiry.clone())
        }),
        Mutant::NotifyRevKept => set(&mut stages, "notify_rev", "$notify_rev".into()),
        Mutant::NotifyRevAlwaysRises => {
            let next = doc! { "$add": [{ "$ifNull": ["$rev", 0_i64] }, 1_i64] };
            stages.insert(0, doc! { "$set": { "notify_rev": next.clone() } });
            set(&mut stages, "notify_rev", next.into());
        }
        Mutant::WaiterOutlivesRelease => replace(&mut stages, |operator, operands| {
            (operator == "$in" && operands.first()? == &"$$left.id".into()).then_some(false.into())
        }),
        Mutant::UnknownReleaseForgotten => replace(&mut stages, |operator, operands| {
            let room = operands.last()?.as_document()?.get_array("$min").ok()?;
            (operator == "$slice" && room.first()? == &"$$room".into()).then(|| Bson::Array(Vec::new()))
        }),
        Mutant::KeptOutWhatIsInUse => replace(&mut stages, |operator, operands| {
            let over = operands.first_chunk::<2>()?;
            let is_known = over == &["$departures.id".into(), "$$gone.id".into()];
            (operator == "$concatArrays" && is_known).then(|| doc! { "$concatArrays": over.to_vec() }.into())
        }),
        Mutant::SettledTakeAllRoom => replace(&mut stages, |operator, operands| {
            (operator == "$min" && operands.first()? == &"$$room".into()).then(|| operands[0].clone())
        }),
        Mutant::LastingForgotten => replace(&mut stages, |operator, operands| {
            (operator == "$and" && operands.first()? == &"$$d.lasting".into()).then_some(false.into())
        }),
        Mutant::NamedForgotten => replace(&mut stages, |operator, operands| {
            let named = operands.last()?.as_document()?.get_array("$in").ok()?;
            (operator == "$or" && named.first()? == &"$$d.id".into()).then(|| operands[0].clone())
        }),
        Mutant::RepetitionUnmarked => replace(&mut stages, |operator, operands| {
            let [whose, Bson::Document(change)] = operands else { return None };
            let mut unmarked = change.clone();
            unmarked.remove("repeated").filter(|_| operator == "$mergeObjects")?;
            Some(doc! { "$mergeObjects": [whose.clone(), unmarked] }.into())
        }),
        Mutant::OtherModeRenewed => replace(&mut stages, |operator, operands| {
            let is_same = operator == "$in" && operands.first()?.as_document()?.contains_key("shared_limit");
            is_same.then_some(true.into())
        }),
        Mutant::HoldersLimitIgnored => replace(&mut stages, |operator, operands| {
            (operator == "$min" && operands.first()? == &"$$value.limit".into()).then(|| operands[1].clone())
        }),
        Mutant::BlockKept => replace(&mut stages, |operator, operands| {
            (operator == "$in" && operands.first()? == &"$$until".into()).then_some(false.into())
        }),
        Mutant::OutsideLiteral => unquote(&mut stages),
    }
    stages
}

/// Replaces the value of a field in every stage that sets it.
fn set(stages: &mut [Document], field: &str, value: Bson) {
    for stage in stages {
        if let Ok(fields) = stage.get_document_mut("$set").map(|fields| fields as &mut Document)
            && fields.contains_key(field)
        {
            fields.insert(field, value.clone());
        }
    }
}

/// Replaces every expression `{ operator: [operands] }` for which `by` returns another one. If `by`
/// replaces nothing, the mutant equals the pipeline, and the test that must catch the mutant fails.
fn replace(stages: &mut [Document], by: impl Fn(&str, &[Bson]) -> Option<Bson> + Copy) {
    rewrite(stages, &|expression| match expression.iter().next() {
        Some((operator, Bson::Array(operands))) => by(operator, operands),
        _ => None,
    });
}

/// Replaces every `$literal` by its value.
fn unquote(stages: &mut [Document]) {
    rewrite(stages, &|expression| expression.get("$literal").cloned());
}

/// Replaces every document in the stages for which `by` returns another value.
fn rewrite(stages: &mut [Document], by: &dyn Fn(&Document) -> Option<Bson>) {
    for stage in stages {
        for (_, value) in stage.iter_mut() {
            rewrite_value(value, by);
        }
    }
}

fn rewrite_value(value: &mut Bson, by: &dyn Fn(&Document) -> Option<Bson>) {
    match value {
        Bson::Document(document) => match by(document) {
            Some(other) => *value = other,
            None => document.iter_mut().for_each(|(_, inner)| rewrite_value(inner, by)),
        },
        Bson::Array(values) => values.iter_mut().for_each(|inner| rewrite_value(inner, by)),
        _ => {}
    }
}
