//! A list in the order of arrival in which each name stands once, and is found without a walk.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;

use super::{Acquisition, LeaseId, Timestamp};

/// Lists up to this long are walked: most have one entry, for which an index would be an allocation more.
const WALKED: usize = 16;

/// What an entry of a list is called.
pub(crate) trait Named {
    type Name: Copy + Eq + Hash;

    fn name(&self) -> Self::Name;
}

impl Named for LeaseId {
    type Name = Self;

    fn name(&self) -> Self {
        *self
    }
}

impl Named for Timestamp {
    type Name = Self;

    fn name(&self) -> Self {
        *self
    }
}

impl Named for Arc<Acquisition> {
    type Name = LeaseId;

    fn name(&self) -> LeaseId {
        self.id
    }
}

/// The list. Only its entries count when it is compared.
#[derive(Debug, Clone)]
pub(crate) struct Distinct<T: Named> {
    entries: Vec<T>,
    /// The position of each entry, if the list is too long to be walked.
    #[expect(
        clippy::box_collection,
        reason = "an edit has eight lists, hardly any with an index; a pointer is smaller"
    )]
    index: Option<Box<HashMap<T::Name, usize>>>,
}

impl<T: Named> Distinct<T> {
    /// Adds an entry, unless one has its name already; then returns that one.
    pub(super) fn add(&mut self, entry: T) -> Option<&mut T> {
        let name = entry.name();
        if let Some(position) = self.position(name) {
            return self.entries.get_mut(position);
        }
        self.entries.push(entry);
        let length = self.entries.len();
        if length > WALKED {
            // The index is empty until the list is too long, and has all entries but the new one from then on.
            let index = self.index.get_or_insert_default();
            let first = index.len();
            index.extend((first..length).map(|position| (self.entries[position].name(), position)));
        }
        None
    }

    /// Whether an entry has this name.
    pub(super) fn has(&self, name: T::Name) -> bool {
        self.position(name).is_some()
    }

    /// The entry with this name.
    pub(super) fn get(&self, name: T::Name) -> Option<&T> {
        self.position(name).map(|position| &self.entries[position])
    }

    /// Changes each entry in a way that leaves it its name.
    pub(super) fn change(&mut self, change: impl FnMut(&mut T)) {
        self.entries.iter_mut().for_each(change);
    }

    fn position(&self, name: T::Name) -> Option<usize> {
        match &self.index {
            Some(index) => index.get(&name).copied(),
            None => self.entries.iter().position(|entry| entry.name() == name),
        }
    }
}

impl<T: Named> Default for Distinct<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), index: None }
    }
}

impl<T: Named + PartialEq> PartialEq for Distinct<T> {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl<T: Named + Eq> Eq for Distinct<T> {}

impl<T: Named> Deref for Distinct<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_stands_once_in_lists_of_any_length() {
        for length in [1, WALKED, WALKED + 1, 5 * WALKED] {
            let mut list = Distinct::default();
            let instants: Vec<_> = (0..length).map(|number| Timestamp(number as i64)).collect();
            for instant in &instants {
                assert_eq!(list.add(*instant), None);
                assert!(list.has(*instant));
                assert_eq!(list.get(*instant), Some(instant));
            }
            for instant in &instants {
                assert_eq!(list.add(*instant), Some(&mut instant.clone()));
            }
            assert_eq!(list[..], instants[..]);
            assert!(!list.has(Timestamp(-1)));
        }
    }
}
