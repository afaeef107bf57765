use serde::{Deserialize, Serialize};

/// A pair of the same thing for the keys and for the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeyValue<T> {
    /// That of the keys.
    pub keys: T,
    /// That of the values.
    pub values: T,
}

impl KeyValue<&str> {
    /// The parts' names in files.
    pub(crate) const NAMES: Self = Self {
        keys: "keys",
        values: "values",
    };
}

impl<T> KeyValue<T> {
    /// Makes a pair.
    pub fn new(keys: T, values: T) -> Self {
        Self { keys, values }
    }

    /// References to both.
    pub fn as_ref(&self) -> KeyValue<&T> {
        KeyValue::new(&self.keys, &self.values)
    }

    /// Mutable references to both.
    pub fn as_mut(&mut self) -> KeyValue<&mut T> {
        KeyValue::new(&mut self.keys, &mut self.values)
    }

    /// Applies `f` to each, the keys first.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> KeyValue<U> {
        KeyValue::new(f(self.keys), f(self.values))
    }

    /// Applies `f` to each, the keys first.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<KeyValue<U>, E> {
        Ok(KeyValue::new(f(self.keys)?, f(self.values)?))
    }

    /// Pairs each with that of another.
    pub fn zip<U>(self, other: KeyValue<U>) -> KeyValue<(T, U)> {
        KeyValue::new((self.keys, other.keys), (self.values, other.values))
    }
}

impl<T> IntoIterator for KeyValue<T> {
    type Item = T;
    type IntoIter = std::array::IntoIter<T, 2>;

    /// The keys', then the values'.
    fn into_iter(self) -> Self::IntoIter {
        [self.keys, self.values].into_iter()
    }
}

impl<T> FromIterator<KeyValue<T>> for KeyValue<Vec<T>> {
    fn from_iter<I: IntoIterator<Item = KeyValue<T>>>(pairs: I) -> Self {
        let pairs = pairs.into_iter().map(|pair| (pair.keys, pair.values));
        let (keys, values) = pairs.unzip();
        Self { keys, values }
    }
}
